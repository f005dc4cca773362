"""Low-rank adapters: LoRA and DoRA on the linear layers of any model, and PEFT's files.

The parameters of the model stay as they are; adapters are a second, small tree of parameters.
"""

from tjx_nn.lora.adapters import base_axes as base_axes
from tjx_nn.lora.adapters import base_params as base_params
from tjx_nn.lora.adapters import bind as bind
from tjx_nn.lora.adapters import init as init
from tjx_nn.lora.adapters import logical_axes as logical_axes
from tjx_nn.lora.adapters import merge as merge
from tjx_nn.lora.adapters import stack_axes as stack_axes
from tjx_nn.lora.adapters import unmerge as unmerge
from tjx_nn.lora.peft import load as load
from tjx_nn.lora.peft import save as save
