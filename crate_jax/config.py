"""The base configuration and the config-string parser; what its values may be is in crate_jax/validation.py.

Every key that any part of the library reads stands in :func:`base` with its default and its
meaning. A file in ``configs/`` starts from :func:`base`, changes what its experiment needs and
returns the result; nothing reads a key that is not here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from crate_jax.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Middle of what arXiv 2411.00392 searched for joint-embedding methods. It has no reconstruction: a starting point.
PENALTY_WEIGHTS = {"none": 0.0, "so": 1e-6, "srip": 1e-4}


def base() -> ConfigDict:
    """Returns the full default configuration, locked against unknown keys."""
    c = ConfigDict()
    c.job = "pretrain"  # what `python -m crate_jax.main` does with this config
    c.method = "reconstruction"  # what pre-training optimises, a name of METHODS
    c.seed = 0  # initial weights, order of the images, augmentation, corruption
    c.steps = 0  # optimiser steps; 0: from `epochs`
    c.epochs = 0.0  # passes over the training split; 0: from `steps`
    c.batch_size = 256  # images per optimiser step, over all devices and micro-batches
    c.accumulate = 1  # micro-batches per optimiser step; same update, less memory
    c.init_from = ""  # workdir or weights file whose encoder starts this run
    c.checkpoint = ""  # workdir or weights file of the encoder that is judged; report: also several, A,B,C
    c.dtype = "float32"  # activations: float32 | bfloat16; parameters are always float32
    c.remat = False  # recompute each block in the backward pass: less memory, more time
    c.remat_keep = "nothing"  # of a recomputed block: nothing | weights (products with weights) | products (all)

    c.mesh = mesh = ConfigDict()  # devices along the two axes; 0: the rest. A batch is split over both
    mesh.data = 0  # copies of the parameters; 1, with model=0: fully sharded
    mesh.model = 1  # devices that hold one copy together

    c.data = data = ConfigDict()
    data.source = "digits"  # digits | folder:PATH | tfds:NAME | synthetic
    data.data_dir = ""  # tfds: where the prepared (ArrayRecord) data sets lie
    data.train_split = "train"  # folder: a sub-folder, or the whole tree if there is none
    data.eval_split = "auto"  # auto: the first of test, val, validation that exists (tfds: with labels)
    data.image_size = (224, 224)  # height, width in pixels
    data.mean = IMAGENET_MEAN  # per channel, of pixels scaled to [0, 1]
    data.std = IMAGENET_STD
    data.crop_scale = (0.2, 1.0)  # random resized crop: share of the area; (1, 1): no crop
    data.crop_ratio = (3 / 4, 4 / 3)  # width / height of the crop, log-uniform
    data.flip = 0.5  # probability of a horizontal flip
    data.interpolation = "bicubic"  # bicubic | bilinear
    data.randaugment_layers = 0  # operations per image (n); 0: off
    data.randaugment_magnitude = 14  # strength of each (m), 0..30
    data.eval_crop = 0.875  # share of the shorter side in the central evaluation crop
    data.workers = 0  # decoding processes; 0: threads of this process
    data.threads = 4  # reading threads per process
    data.prefetch = 2  # batches held ready on the device
    data.memory_mb = 1024  # a decoded set up to this size is held in memory, whole
    data.max_undecodable = 0.01  # share of files that may fail to decode before the run stops

    c.encoder = encoder = ConfigDict()
    encoder.name = "crate"  # crate | vit
    encoder.patch_size = 16  # side of a square patch in pixels
    encoder.width = 768
    encoder.depth = 12
    encoder.heads = 12
    # sincos (fixed) | learned | relative (vit: one bias for all blocks) | relative_per_block | none
    encoder.positions = "sincos"
    encoder.eta = 0.1  # crate: step size of ISTA
    encoder.lam = 0.5  # crate: sparsity weight lambda of ISTA
    encoder.dictionary = "complete"  # crate: complete (d x d) | overcomplete (CRATE-alpha)
    encoder.expansion = 4  # crate: atoms per dimension of the over-complete dictionary
    encoder.tied_output = False  # crate: MSSA's output is [U_1..U_K] (eq. 2.8), not free
    encoder.mlp_ratio = 4.0  # vit
    encoder.qkv_bias = "qkv"  # vit: qkv (MAE) | qv (BEiT, ROPIM) | none
    encoder.layer_scale = 0.0  # vit: initial value; 0: off
    encoder.drop_path = 0.0  # vit: rate of the last block, rising linearly from 0
    encoder.embed_norm = False  # layer norms before and after the patch projection, as supervised CRATE
    encoder.final_norm = True  # normalise the last block's tokens
    encoder.final_eps = 1e-6  # added to the variance in that norm; supervised CRATE: 1e-5
    encoder.init = "xavier"  # vit: xavier (MAE) | trunc_normal (BEiT, ROPIM)

    c.decoder = decoder = ConfigDict()
    decoder.name = "crate"  # crate | transformer | linear
    decoder.width = 0  # 0: the encoder's
    decoder.depth = 12
    decoder.heads = 12
    decoder.positions = False  # crate: add the position table again at the decoder's input
    decoder.residual = "stream"  # crate: stream, g - MSSA(LN(g)) | normalised, as Listing 3

    c.corruption = corruption = ConfigDict()
    corruption.name = "mask"  # mask | rop | noise | none
    corruption.mask_ratio = 0.75  # mask: share of the patches removed
    corruption.mask_fill = "token"  # mask: token (learned) | zero | drop (encoder skips them)
    corruption.rop_ratio = 1 / 7  # rop: share of the dimensions kept, K'/K
    corruption.rop_buckets = "balanced"  # rop: balanced (as released) | independent
    corruption.rop_signs = "independent"  # rop: independent | balanced (as released)
    corruption.paper_scale = 0.0  # rop: 0: exact projector; 0.14: the released code's scale
    corruption.noise_std = 0.5  # noise: standard deviation, in units of normalised pixels

    c.loss = loss = ConfigDict()
    loss.norm = "l2"  # l2 | l1
    loss.target = "pixel"  # pixel | patch_normalised
    loss.region = "complement"  # complement, (I - P)(x - x^) | all

    c.penalty = penalty = ConfigDict()
    penalty.name = "none"  # none | so | srip
    penalty.weight = 0.0  # gamma
    penalty.include = (r"encoder/.*kernel",)  # whole-name patterns of the weights acted on
    penalty.exclude = ()  # patterns taken out again
    penalty.gram = "smaller"  # smaller | in (W^T W of torch's out x in) | out (W W^T)
    penalty.power = 1  # srip: sigma ** power, 1 (formula) | 2 (as some released code)
    penalty.iterations = 2  # srip: power iterations per step
    penalty.keep_vector = True  # srip: start from the last step's vector; False: a fresh one

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | lars | lion
    optimizer.lr = 1.5e-4  # peak, per `lr_batch` images
    optimizer.lr_batch = 256  # lr, warmup_lr, min_lr are multiplied by batch_size / this; 0: not
    optimizer.warmup_epochs = 0.0  # linear warm-up, in epochs ...
    optimizer.warmup_steps = 0  # ... or in steps
    optimizer.warmup_lr = 0.0  # where the warm-up starts
    optimizer.min_lr = 0.0  # where the schedule ends
    optimizer.schedule = "cosine"  # cosine | linear | constant
    optimizer.b1 = 0.9  # adamw, lion
    optimizer.b2 = 0.95  # adamw, lion
    optimizer.momentum = 0.9  # lars
    optimizer.trust_coefficient = 0.001  # lars
    optimizer.weight_decay = 0.05
    optimizer.layer_decay = 1.0  # factor on the learning rate per layer below the head
    optimizer.decay_exclude = (r".*(cls_token|mask_token|positions|relative_bias)",)  # and 1-D
    optimizer.clip_norm = 0.0  # global gradient norm; 0: off
    optimizer.ema = 0.0  # decay of an average of the weights that evaluations use; 0: off

    c.evaluation = evaluation = ConfigDict()
    evaluation.every = 0  # steps between k-NN and probe; 0: only at the end
    evaluation.train_images = 10_000  # images the classifiers are fitted on; 0: all
    evaluation.test_images = 10_000  # 0: all
    evaluation.batch_size = 256
    evaluation.pool = "cls"  # cls | mean (over patch tokens) | cls_mean (both, one after the other)
    evaluation.layer = 0  # tokens after this block, 1..depth; 0: after the encoder's final norm
    evaluation.knn_k = 20
    evaluation.knn_temperature = 0.07
    evaluation.probe_c = 1.0  # inverse L2 strength of the logistic regression

    c.protocol = protocol = ConfigDict()  # evaluate, finetune, segment: how; its options are keys here too
    protocol.name = ""
    protocol.scratch = False  # a random encoder of the checkpoint's shape
    protocol.metric = "top1"  # the headline: top1 | mean_per_class | miou

    c.finetune = finetune = ConfigDict()  # classifier on the encoder, both trained
    finetune.norm = True  # layer norm between the pooled tokens and the linear head
    finetune.final_norm = True  # keep the encoder's own last norm
    finetune.head_init = 1.0  # factor on the head's initial weights
    finetune.drop_path = 0.0  # vit: replaces encoder.drop_path
    finetune.relative_bias = "shared"  # vit: shared | per_block (each block its own copy)
    finetune.freeze = False  # train the head only
    finetune.label_smoothing = 0.0
    finetune.mixup = 0.0  # alpha of the Beta distribution of the mixing weight; 0: off
    finetune.cutmix = 0.0  # the same for boxes of the other image; with both, half of the images each
    finetune.erase = 0.0  # probability that a random box of an image becomes noise

    c.segment = segment = ConfigDict()  # a class for each pixel; also read: finetune.freeze, final_norm, drop_path
    segment.head = "linear"  # linear | upernet
    segment.blocks = ()  # whose tokens the head reads, from 1; (): linear: the last, upernet: BEiT's four
    segment.channels = 0  # upernet: width of the head; 0: the encoder's
    segment.auxiliary = 0.0  # upernet: weight of the loss of a second, small head on the third of the blocks
    segment.classes = 0  # 0: the highest class of the training masks, plus 1
    segment.ignore_index = 255  # value in the masks that is no class; -1: none
    segment.reduce_zero_label = False  # 0 in the masks is no class, the classes start at 1 (ADE20K)

    c.sweep = sweep = ConfigDict()  # job sweep: one run per value and seed
    sweep.key = ""  # the key that is varied, such as encoder.lam
    sweep.values = ()  # its values; read as sweep["values"], for a ConfigDict has a method of that name
    sweep.seeds = 1  # runs per value, with the seeds seed, seed + 1, ...

    c.align = align = ConfigDict()  # job align: alignment of reconstruction and labels, in closed form
    align.width = 0  # k at which corruptions are compared; 0: the encoder's width
    align.latents = 1024  # curves run from 1 to this k
    align.patch_sizes = (1, 2, 4)  # mask: sides of square patches in pixels, or (height, width), as in 1,(2,8)
    align.mask_ratios = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)  # removed shares
    align.rop_ratios = (0.05, 0.1, 1 / 7, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75)  # kept shares, of the encoder's patches
    align.noise = 1e-3  # added to the images, in units of their standard deviation: no direction is empty
    align.side = 32  # larger images are shrunk to this at most, the encoder's grid of tokens kept

    c.report = report = ConfigDict()
    report.sections = ()  # what it holds, names of crate_jax/jobs/report.py; (): all that is about runs

    c.whitebox = whitebox = ConfigDict()  # pretrain: what each layer does, logged as whitebox/...
    whitebox.every = 0  # steps; 0: off
    whitebox.images = 16  # of the evaluation split, always the same ones
    whitebox.measure = "paper"  # R^c of Z^{l+1/2}, patch tokens | released (the authors' script) | both

    c.nonfinite = nonfinite = ConfigDict()  # a step whose loss or gradient is NaN or infinite
    nonfinite.skip = 0  # so many in a row are left without effect before the run stops; 0: it stops at the first

    c.save = save = ConfigDict()  # checkpoints
    save.every = 1000  # steps; the last step is always saved
    save.keep = 3

    c.log = log = ConfigDict()
    log.every = 50  # steps
    log.pictures = 8  # images in the reconstruction grid; 0: no pictures
    log.pictures_every = 0  # steps; 0: only at the end
    log.tensorboard = True  # needs tensorboardX
    log.wandb = ""  # project name; empty: off
    log.report = True  # report.html at the end: curves, scores and pictures
    return c.lock()


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses a config string such as ``"variant=S,penalty=so,debug"``.

    Args:
      arg: comma-separated ``key=value`` pairs; a bare ``key`` means ``key=True``.
      **defaults: every key that is allowed, with its default. A tuple lists the allowed values,
        the first being the default. Values are cast to the default's type.

    Returns:
      A locked ConfigDict with one entry per key of `defaults`.

    Raises:
      ConfigError: an unknown key, or a value that is not allowed or cannot be cast.
    """
    out = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            valid = f"valid keys: {', '.join(sorted(defaults))}" if defaults else "this config takes none"
            raise ConfigError(f"config string: unknown key '{key}'; {valid}")
        allowed = defaults[key]
        kind = type(out[key])
        if kind is bool:
            text = text or "True"
            if text.lower() not in ("true", "false", "1", "0"):
                raise ConfigError(f"config string: {key}={text} is not a boolean (true or false)")
            value: Any = text.lower() in ("true", "1")
        else:
            try:
                value = kind(text)
            except ValueError:
                raise ConfigError(f"config string: {key}={text!r} is not a valid {kind.__name__}") from None
        if isinstance(allowed, tuple) and value not in allowed:
            raise ConfigError(
                f"config string: {key}={value} is not one of {', '.join(map(str, filter(None, allowed)))}"
            )
        out[key] = value
    return ConfigDict(out).lock()


def to_json(config: ConfigDict) -> str:
    """Serialises a config; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a config (or its parsed JSON) to ``{"data.source": ...}``, tuples as lists."""
    flat: dict[str, Any] = {}
    for key in sorted(config):
        value = config[key]
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists ``"key: old -> new"`` for every key whose value differs between two configs."""
    a, b = flatten(old), flatten(new)
    missing = "(none)"
    return [
        f"{k}: {a.get(k, missing)!r} -> {b.get(k, missing)!r}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k, missing) != b.get(k, missing)
    ]
