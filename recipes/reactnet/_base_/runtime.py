"""What all recipes of binary networks share: the plugin, its hooks, logging and seeds."""

custom_imports = dict(imports=["mmcls_bnn.register"], allow_failed_imports=False)
default_scope = "mmcls"

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=100),
    param_scheduler=dict(type="ParamSchedulerHook"),
    # Two are kept, because mmengine removes an old one before it writes the new one.
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="VisualizationHook", enable=False),
)
custom_hooks = [
    dict(type="SafeCheckpointHook"),
    dict(type="EpochSeedHook"),
    dict(type="FlipRatioHook"),
    dict(type="CurvesHook"),
    dict(type="SoftLabelsHook"),  # does nothing without model.distillation.soft_labels
]
param_scheduler = [dict(type="LinearDecay")]  # over train_cfg.max_epochs
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
# Works on GPUs and on the CPU: the module is on its device already.
model_wrapper_cfg = dict(
    type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False, find_unused_parameters=False
)
visualizer = dict(type="ClsVisualizer", vis_backends=[dict(type="LocalVisBackend")])
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=0)
