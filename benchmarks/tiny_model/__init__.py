"""How `softprompt.tiny` was made: generated tweets, a tokenizer and a pretrained model.

generate.py      the two tables: `python -m benchmarks.tiny_model.generate`
instructions.py  what a prompt may ask for; words.py  what tweets are made of
pretrain.py      tokenizer and weights: `python -m benchmarks.tiny_model.pretrain`
recipe.py        a soft prompt of stock PEFT on the result: `python -m benchmarks.tiny_model.recipe`
"""
