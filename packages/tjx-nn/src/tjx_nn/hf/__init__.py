"""Models in the format of Hugging Face transformers: read, written, fetched from the hub.

A folder holds a config.json and safetensors files. Needs the extra: `pip install 'tjx-nn[hf]'`.
"""

from tjx_nn.hf.load_save import load as load
from tjx_nn.hf.load_save import save as save
