"""Defaults of the two kinds of config. Every other config starts from one of them and changes some fields.

Fields keep the published names. `utils/config.py` defines the values that each accepts.
"""

from ml_collections import ConfigDict, FieldReference


def autoencoder_config(img_size):
    """Stage 1, the mollified diffusion autoencoder, with the published values of the 128² model.

    img_size is a reference: when it is overridden on the command line, q_sample (a quarter of the pixels) and
    multiscale_max_img_size (half of the side) follow.
    """
    img_size = FieldReference(img_size)
    config = ConfigDict()

    config.run = run = ConfigDict()
    run.name = "infty_diff"  # the wandb project
    run.experiment = "autoencoder"  # the folder below output_dir, and the wandb run
    run.output_dir = "checkpoints"
    run.wandb_dir = "."
    run.wandb_mode = "disabled"  # online, offline, disabled
    run.device = "auto"  # auto, cpu, cuda, cuda:1, ...
    run.seed = 0

    config.data = data = ConfigDict()
    data.name = "photos"  # photos, tissue, folder, ffhq, celeba, churches, function
    data.root_dir = ""
    data.function = ""  # for name=function: module:attribute of a callable; the module is imported, so its code runs
    data.num_functions = 10_000  # training set: functions 0, 1, …
    data.num_heldout_functions = 512  # held-out set: the next functions
    data.condition = "none"  # none, class, vector: of every image, for the networks to follow (docs/conditions.md)
    data.condition_source = ""  # vectors: an .npz file; default: conditions.npz in root_dir. Functions: a callable
    data.img_size = img_size
    data.channels = 3  # or 1; any number for functions
    data.background = "white"  # colour under transparent pixels
    data.white_level = 0.0  # white in grey images of more than 8 bits; 0: as the files declare
    data.fid_samples = 50_000
    data.num_workers = 8

    config.train = train = ConfigDict()
    train.load_checkpoint = True
    train.allow_other_data = False  # continue a run on other data than it was trained on
    train.amp = True
    train.precision = "auto"  # auto, bf16, fp16, fp32; amp=False means fp32
    train.compile = FieldReference("auto", field_type=object)  # auto (on a GPU), True, False
    train.deterministic = False  # PyTorch's deterministic algorithms, slower on a GPU
    train.checkpoint_activations = False  # activation checkpointing: less memory, a third more time
    train.batch_size = 16  # images per update, over all ranks
    train.accumulation_steps = 1  # micro-batches per update on each rank, to use less memory
    train.sample_size = 16
    train.max_steps = 1_000_000
    train.plot_graph_steps = 100
    train.plot_samples_steps = 5_000  # also at the end; 0: never
    train.validate_steps = 5_000
    train.checkpoint_steps = 5_000
    train.keep_checkpoints = 2  # the newest ones; the best is kept too
    train.nonfinite = "stop"  # stop, skip: reaction to a non-finite loss or gradient
    train.max_nonfinite_skips = 10  # consecutive skips before the run stops
    train.ema_update_every = 10
    train.ema_decay = 0.995

    config.model = model = ConfigDict()
    model.nf = 64
    model.time_emb_dim = 256
    model.num_conv_blocks = 3
    model.knn_neighbours = 3
    model.depthwise_sparse = True
    model.kernel_size = 7
    model.operator = "paper"  # paper, consistent (the same mean at every fraction of the pixels)
    model.backend = "auto"  # auto, torch_dense, numba, triton, torchsparse, spconv
    model.attention = "auto"  # auto, sdpa, flash_attn
    model.uno_res = 64
    model.uno_base_channels = 64
    model.uno_mults = (1, 2, 4, 8)
    model.uno_blocks_per_level = (2, 2, 2, 2)
    model.uno_attn_resolutions = (16, 8)
    model.uno_dropout_from_resolution = 16
    model.uno_dropout = 0.1
    model.uno_conv_type = "conv"  # conv, spectral
    model.z_dim = 256  # 0: no encoder, an unconditional diffusion model
    model.condition = "both"  # both, decoder, latent: networks that get data.condition
    model.condition_dropout = 0.1  # share of the training images without a condition
    model.learn_sigma = False
    model.sigma_small = False
    model.stochastic_encoding = False
    model.kld_weight = 1e-4

    config.diffusion = diffusion = ConfigDict()
    diffusion.objective = "ddpm"  # ddpm, flow, few_step
    diffusion.steps = 1000
    diffusion.noise_schedule = "cosine"  # cosine, linear, shifted_cosine, const0.008
    diffusion.schedule_sampler = "uniform"  # uniform, loss-second-moment
    diffusion.loss_type = "mse"  # mse, l1, rescaled_mse
    diffusion.gaussian_filter_std = 1.0  # sigma of the mollifier, in pixels at img_size
    diffusion.mollifier_type = "dct"  # dct, none
    diffusion.model_mean_type = "mollified_epsilon"  # mollified_epsilon, epsilon, v, xstart
    diffusion.data_std = 0.5  # of a mollified image at a point, for preconditioning; photographs have 0.45 to 0.55
    diffusion.precondition = False
    diffusion.balance_loss = False  # equal weight for the preconditioned network's error at every step
    diffusion.multiscale_loss = False
    diffusion.multiscale_max_img_size = img_size // 2

    config.mc_integral = mc_integral = ConfigDict()
    mc_integral.type = "uniform"  # uniform, halton, stratified
    mc_integral.q_sample = img_size * img_size // 4

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.adam_beta1 = 0.9
    optimizer.adam_beta2 = 0.99
    optimizer.warmup_steps = 0
    optimizer.decay = "none"  # none, cosine (to zero at train.max_steps)
    optimizer.clip_gradient_norm = 1.0
    optimizer.gradient_skip = False
    optimizer.gradient_skip_threshold = 500.0
    return config


def latent_config():
    """Stage 2, the diffusion model over latents, with the published values.

    The data set and the autoencoder come from --decoder_config.
    """
    config = ConfigDict()

    config.run = run = ConfigDict()
    run.name = "infty_diff"
    run.experiment = "latent"
    run.output_dir = "checkpoints"
    run.wandb_dir = "."
    run.wandb_mode = "disabled"
    run.device = "auto"
    run.seed = 0

    config.data = data = ConfigDict()
    data.fid_samples = 50_000

    config.train = train = ConfigDict()
    train.load_checkpoint = True
    train.allow_other_data = False  # continue a run on other data than it was trained on
    train.amp = True
    train.precision = "auto"
    train.compile = FieldReference("auto", field_type=object)
    train.deterministic = False  # PyTorch's deterministic algorithms, slower on a GPU
    train.batch_size = 256
    train.accumulation_steps = 1
    train.sample_size = 16
    train.max_steps = 1_000_000
    train.plot_graph_steps = 100
    train.plot_samples_steps = 10_000  # also at the end; 0: never
    train.validate_steps = 1_000
    train.checkpoint_steps = 5_000
    train.keep_checkpoints = 2  # the newest ones; the best is kept too
    train.nonfinite = "stop"  # stop, skip: reaction to a non-finite loss or gradient
    train.max_nonfinite_skips = 10  # consecutive skips before the run stops
    train.ema_update_every = 10
    train.ema_decay = 0.995

    config.model = model = ConfigDict()
    model.z_dim = 256
    model.num_layers = 10
    model.hid_channels = 2048
    model.time_embed_dim = 128
    model.dropout = 0.0
    model.condition_dropout = 0.1  # share of the training latents without a condition

    config.diffusion = diffusion = ConfigDict()
    diffusion.objective = "ddpm"
    diffusion.steps = 1000
    diffusion.noise_schedule = "const0.008"
    diffusion.schedule_sampler = "uniform"
    diffusion.loss_type = "l1"
    diffusion.model_mean_type = "epsilon"

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.adam_beta1 = 0.9
    optimizer.adam_beta2 = 0.99
    optimizer.weight_decay = 0.04
    optimizer.warmup_steps = 0
    optimizer.decay = "none"  # none, cosine (to zero at train.max_steps)
    optimizer.clip_gradient_norm = 1.0
    optimizer.gradient_skip = False
    optimizer.gradient_skip_threshold = 500.0
    return config
