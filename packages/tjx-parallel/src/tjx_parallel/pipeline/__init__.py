"""Pipeline parallelism: schedules and gradients over stages."""
