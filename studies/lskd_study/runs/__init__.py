"""How runs are executed: one job, the scheduler, clusters."""
