"""Hugging Face transformers checkpoints: load, save and download from the hub.

A checkpoint folder has a config.json and safetensors files. `register` adds a family of models.
Requires `pip install 'tjx-nn[hf]'`.
"""

from tjx_nn.hf.families import register as register
from tjx_nn.hf.inspection import Inspection as Inspection
from tjx_nn.hf.inspection import inspect as inspect
from tjx_nn.hf.load_save import load as load
from tjx_nn.hf.load_save import load_config as load_config
from tjx_nn.hf.load_save import save as save
