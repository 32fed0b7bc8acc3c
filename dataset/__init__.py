"""Pictures before they are tensors: opening, cropping, edges, data sets, batches, caches.

    pictures.py     one picture: opening, preparation, tensors, edges
    folders.py      paired, unpaired and captioned data sets
    digits.py       the data set digits
    loader.py       the batches of each training step
    cache.py        latents and text contexts, computed once; priors
    check.py        what a data set holds, and what is wrong with it

A paired data set is a folder in the layout of img2img-turbo
(github.com/GaParmar/img2img-turbo):

    train_A/                inputs
    train_B/                targets of the same file name or stem
    train_prompts.json      {"file name": "caption"}
    test_A/  test_B/  test_prompts.json

Without a prompts.json, captions are read from a .txt beside a
picture, and a picture without one has an empty caption.

An unpaired data set has the same four folders, in which names need
not match, and a caption for each domain:

    fixed_prompt_a.txt
    fixed_prompt_b.txt

YOSO trains on pictures with captions. They are the targets of a
paired data set, or one of these:

    FOLDER      pictures, with a metadata.jsonl of lines
                {"file_name": ..., "text": ...}, or a .txt beside each;
                of a list of texts each step draws one
    FILE.zip    pictures, with a dataset.json in the layout of EDM,
                {"labels": [["name", class], ...]}
    FILE.txt    captions alone, one a line: a --teacher draws pictures
    digits      10,000 handwritten digits (a folder of that name: ./digits)
    drawn:scenes, drawn:loose
                drawn while training (tiny/scenes.py)
    CACHE       what `python -m dataset cache` made of one of these

Every tenth item of these is for the test, unless FOLDER has the
subfolders train/ and test/; of the digits, a hundred a class.

Pictures are files under the suffixes of pictures.SUFFIXES, directly in
their folder. What else is there is named in one line on stderr when a
data set is opened, and so is how many captions are empty.

A ValueError of one sentence says what is wrong with a data set. It is
raised when the data set is opened, or when the item of a damaged
picture is read.

Commands (each has --help):

    python -m dataset check DATA [--for pix2pix|cyclegan|yoso] [--base BASE]
        opens DATA as the trainer does, reads every file,
        prints counts, sizes, captions and problems,
        with BASE also how many captions are too long for it,
        and writes a contact sheet
    python -m dataset cache DATA --base BASE --output CACHE
        computes latents and text contexts once
    python -m dataset prior FOLDER --base BASE --output FILE
        estimates mean and standard deviation of latents
"""
