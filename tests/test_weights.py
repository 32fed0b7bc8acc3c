"""The former place of the small pipelines, for test files that import them from here.

The tests that were here are in tests/test_files_*.py.
"""

from pipelines import (  # noqa: F401
    ROOT,
    SCHEDULE,
    TEXT,
    TEXTS,
    TOKENIZER,
    UNET,
    VAE,
    tiny_pipeline,
)
