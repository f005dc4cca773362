from .accumulation import AccumulatedGradients as AccumulatedGradients
from .accumulation import LossTotals as LossTotals
from .accumulation import accumulate_gradients as accumulate_gradients
from .accumulation import mean_gradients as mean_gradients
from .accumulation import split_microbatches as split_microbatches
from .guard import GuardState as GuardState
from .guard import init_guard as init_guard
from .guard import is_finite as is_finite
from .guard import select_finite as select_finite
from .guard import update_guard as update_guard
from .guard_config import GuardConfig as GuardConfig
from .norms import global_norm as global_norm
from .norms import layer_norms as layer_norms
from .optimizer_config import OptimizerConfig as OptimizerConfig
from .optimizers import OPTIMIZERS as OPTIMIZERS
from .optimizers import make_optimizer as make_optimizer
from .param_averaging import evaluation_params as evaluation_params
from .param_paths import decay_mask as decay_mask
from .param_paths import path_strings as path_strings
from .registry import register_optimizer as register_optimizer
from .registry import register_schedule as register_schedule
from .schedule_config import ScheduleConfig as ScheduleConfig
from .schedule_config import ScheduleSteps as ScheduleSteps
from .schedules import SCHEDULES as SCHEDULES
from .schedules import learning_rates as learning_rates
from .schedules import make_schedule as make_schedule

__version__: str
