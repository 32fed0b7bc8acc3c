"""The parts of sample.py that are not the method.

    precision.py    the types that networks compute in, torch.compile
    pace.py         how long large pictures take, and tiles
    pictures.py     which file each result goes to, pictures in batches, what failed
"""
