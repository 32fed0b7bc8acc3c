"""Pictures before they are tensors: opening, cropping, edges, folders of pairs, the order of training.

A paired data set is a folder (the layout of img2img-turbo, github.com/GaParmar/img2img-turbo):

    train_A/  train_B/  train_prompts.json      inputs, targets of the same name (or stem), {"file name": "caption"}
    test_A/   test_B/   test_prompts.json       without the json: a .txt beside a picture, else no caption

An unpaired one has the same four folders, names at will, and fixed_prompt_a.txt, fixed_prompt_b.txt. For YOSO's
training, pictures with captions are the targets of a paired set, or any of

    FOLDER                      pictures, with metadata.jsonl ({"file_name": ..., "text": ...}) or a .txt beside each
    FILE.zip                    pictures, with dataset.json ({"labels": [["name", class], ...]}: the layout of EDM)
    FILE.txt                    captions alone, one a line: a --teacher draws the pictures
    CACHE                       what `data.py cache` made of one of these

of which every tenth item is for the test, unless FOLDER has train/ and test/. What is wrong with a folder or a file is
a ValueError of one sentence, at construction or at the item. Commands:

    python data.py check FOLDER                 counts, sizes, captions, problems, and a contact sheet
    python data.py cache DATA --base B --output CACHE           latents and text contexts, computed once
    python data.py prior FOLDER --base B --size S --output F    mean and deviation of a folder's latents
"""
