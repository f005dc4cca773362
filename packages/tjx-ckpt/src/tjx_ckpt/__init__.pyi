from .checkpointer import Checkpointer as Checkpointer
from .config import CheckpointConfig as CheckpointConfig
from .errors import AllCheckpointsCorruptError as AllCheckpointsCorruptError
from .errors import CheckpointError as CheckpointError
from .errors import ClaimError as ClaimError
from .errors import CorruptCheckpointError as CorruptCheckpointError
from .errors import CorruptCheckpointWarning as CorruptCheckpointWarning
from .errors import DirectoryInUseError as DirectoryInUseError
from .errors import MismatchError as MismatchError
from .errors import NoCheckpointError as NoCheckpointError
from .errors import SaveError as SaveError
from .errors import StorageError as StorageError
from .errors import UnreadableError as UnreadableError
from .orbax_format import orbax_specs as orbax_specs
from .orbax_format import read_orbax as read_orbax
from .orbax_format import write_orbax as write_orbax
from .store.backends import find_writer as find_writer
from .store.backends import list_steps as list_steps
from .tree_file import load_tree as load_tree
from .tree_file import save_tree as save_tree
from .writer import SaveReport as SaveReport

__version__: str
