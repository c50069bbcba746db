#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""IRIS in one file: an agent that learns Atari inside its own dreams.

    python iris.py --env Pong

trains, evaluates and draws pictures; --help lists the other modes: --resume, --eval, --dream, --play, --report.
The paper is "Transformers are Sample-Efficient World Models" (Micheli, Alonso, Fleuret, ICLR 2023, arXiv:2209.00588);
sections, equations and appendices cited below are its.
"""
# A discrete autoencoder turns every frame into a few tokens, so a game becomes a text. A GPT learns how that text goes
# on: next frame, reward, end. Sampling from the GPT is a dream of the game, and the policy learns in dreams only: two
# hours of real play teach the autoencoder and the GPT; to the policy they show the few frames that lead to a dream.
#
#      real frame                                        reward, end, next frame's tokens
#          |  encoder                                              ^
#      K = 16 tokens of 512 words  ------------->  transformer over T = 20 steps of K + 1 tokens
#          |  decoder                                              ^
#      reconstructed frame  ---->  actor-critic (CNN, LSTM)  ----> action
# Read it top to bottom. Outside formulas a letter has one meaning: B batch, T time steps, K tokens a frame, S positions
# (K + 1 a step), D width of the transformer, nh heads of size hs, V vocabulary, E size of a code, g = sqrt(K) side of
# the token grid, C channels, A actions, L size of the LSTM, H frames of a dream, N images or anything.
import argparse
import gc
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # torch's threads wait awake for a moment, then sleep

import ale_py  # noqa: F401 (registers the games)
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class InputError(ValueError):
    """Something the user gave cannot work. The message says what, and what to do; main() prints it and exits with 2."""

# ---- 1. Flags: every number of the paper in one place ----------------------------------------------------------------
# The defaults are the paper's. SMALL is what two CPU cores can do in half an hour: the same algorithm with smaller
# networks on a shorter schedule. A flag given on the command line overrides either.
SMALL = dict(
    epochs=11, collect_epochs=11, collect_steps=800, eval_every=6, eval_games=2, final_games=8,
    starts=[1, 5, 7], tokenizer_stop=4, updates=[2000, 180, 60], batches=[8, 32, 32], learning_rates=[1e-3] * 3,
    revive_codes=100, stem_stride=16, tokenizer_blocks=0, embed_dim=64, sequence_length=10, layers=4, width=128,
    dropout=0.0, lstm_size=256, policy_shrink=2, burn_in=4, horizon=10, gamma=0.95, entropy_coef=0.01)
MAY_BE_ZERO = {"seed", "revive_codes", "tokenizer_blocks", "epsilon", "dropout", "gamma", "td_lambda", "entropy_coef"}

def parse_args(argv=None):
    """Flags -> namespace. Bad ones end the program with one line on stderr and exit code 2, or raise InputError."""
    parser = argparse.ArgumentParser("iris.py", description="IRIS: Atari learned inside a world model.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"iris.py: {message} (see python iris.py --help)\n")  # one line
    group, three = parser.add_argument_group, dict(type=int, nargs=3, metavar=("TOK", "WM", "AC"))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add_argument = partial(group("other modes").add_mutually_exclusive_group().add_argument, type=os.path.normpath)
    add_argument("--resume", metavar="RUN", help="go on with this run folder; all flags but --device are its own")
    add_argument("--eval", metavar="RUN", help="play --final-games with this run, or with an authors' checkpoint")
    add_argument("--dream", metavar="RUN", help="pictures and a video from inside this run's world model")
    add_argument("--play", metavar="RUN", help="you play inside this run's world model, in a window")
    add_argument("--report", metavar="FOLDER", help="the table over all evaluated runs below this folder")
    add_argument = group("run").add_argument
    add_argument("--env", default="Pong", help="game: Pong, or ALE/Pong-v5")
    add_argument("--preset", default="auto", choices=("auto", "paper", "small"), help="small: for two CPU cores")
    add_argument("--exp-name", default="iris", help="goes into the run's name")
    add_argument("--seed", type=int, default=1, help="of networks, sampling and games")
    add_argument("--run-dir", default="runs", help="folder for the folders of runs")
    add_argument("--device", default="auto", choices=sorted({"auto", "cpu", best}), help="where to compute")
    add_argument("--mixed-precision", action=argparse.BooleanOptionalAction, help="bfloat16; default: if in hardware")
    add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile; for a GPU")
    add_argument("--torch-deterministic", action="store_true", help="repeatable on a GPU, as far as torch can; slower")
    add_argument = group("schedule and real play; three numbers: of tokenizer, world model, actor-critic").add_argument
    add_argument("--epochs", type=int, default=600, help="an epoch collects, then trains the three in turn")
    add_argument("--collect-epochs", type=int, default=500, help="epochs that collect; 500 x 200 is Atari 100k")
    add_argument("--collect-steps", type=int, default=200, help="real steps of such an epoch")
    add_argument("--starts", **three, default=[6, 26, 51], help="first epochs that train them")
    add_argument("--tokenizer-stop", type=int, default=600, help="last epoch that trains it; then words are fixed")
    add_argument("--updates", **three, default=[200, 200, 200], help="updates of each an epoch")
    add_argument("--batches", **three, default=[256, 64, 64], help="frames, segments, dreams in an update")
    add_argument("--learning-rates", **three | dict(type=float), default=[1e-4] * 3, help="of Adam")
    add_argument("--epsilon", type=float, default=0.01, help="share of random actions while collecting")
    add_argument("--temperature", type=float, default=1.0, help="while collecting; for Freeway 0.01 (appendix)")
    add_argument("--eval-temperature", type=float, default=0.5, help="of the policy in evaluations")
    add_argument("--eval-every", type=int, default=5, help="epochs between evaluations")
    add_argument("--eval-games", type=int, default=16, help="games of such an evaluation")
    add_argument("--final-games", type=int, default=100, help="games of the evaluation at the end, and of --eval")
    add_argument = group("tokenizer, world model, actor-critic").add_argument
    add_argument("--tokens-per-frame", type=int, choices=(16, 64), default=16, help="K; 64: finer, slower (appendix E)")
    add_argument("--vocab-size", type=int, default=512, help="V: codes in the codebook")
    add_argument("--embed-dim", type=int, default=512, help="E: dimensions of a code")
    add_argument("--tokenizer-channels", type=int, default=64, help="C, a multiple of 32")
    add_argument("--tokenizer-blocks", type=int, default=2, help="residual blocks a resolution; decoder: 1 more")
    add_argument("--stem-stride", type=int, choices=(1, 2, 4, 8, 16), default=1, help="above 1: cheaper, coarser")
    add_argument("--perceptual-loss", choices=("auto", "lpips", "none"), default="auto", help="auto: lpips if it can")
    add_argument("--reconstruction-loss", choices=("auto", "l1", "l2"), default="auto", help="auto: l2 without lpips")
    add_argument("--revive-codes", type=int, default=0, help="updates between moves of unused codes; 0: never")
    add_argument("--sequence-length", type=int, default=20, help="T: steps the transformer sees")
    add_argument("--layers", type=int, default=10, help="transformer blocks")
    add_argument("--heads", type=int, default=4, help="attention heads")
    add_argument("--width", type=int, default=256, help="D, a multiple of the heads")
    add_argument("--dropout", type=float, default=0.1, help="on embedding, attention and residuals")
    add_argument("--reward-loss", choices=("cross-entropy", "mse"), default="cross-entropy", help="the paper says mse")
    add_argument("--policy-shrink", type=int, choices=(1, 2, 4), default=1, help="above 1: the policy sees less")
    add_argument("--lstm-size", type=int, default=512, help="L: size of the policy's memory")
    add_argument("--burn-in", type=int, default=20, help="real frames that fill it before a dream")
    add_argument("--horizon", type=int, default=20, help="H: frames of a dream, at most T")
    add_argument("--gamma", type=float, default=0.995, help="discount")
    add_argument("--td-lambda", type=float, default=0.95, help="lambda of the returns: 0 one step, 1 whole dream")
    add_argument("--entropy-coef", type=float, default=0.001, help="weight of the entropy bonus")
    args = parser.parse_args(argv)
    device = best if args.device == "auto" else args.device
    run = re.sub(r"(?<![^/\\])checkpoint\.pt$", ".", args.resume or args.eval or args.dream or args.play or "")
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    bfloat16 = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or device == "cuda"  # in hardware, so it saves time
                    and torch.cuda.is_bf16_supported(including_emulation=False))
    if run:  # its own flags are the defaults; an authors' checkpoint has none, and is the paper's
        config = dict(preset="paper") | read_checkpoint(Path(run)).get("args", {}) | dict(resume=None)
        config |= dict(mixed_precision=bfloat16) if config.get("device") != device else {}  # it was another machine's
    else:
        preset = args.preset if args.preset != "auto" else "small" if device == "cpu" else "paper"
        config = dict(preset=preset, mixed_precision=bfloat16) | (SMALL if preset == "small" else {})
        config |= dict(temperature=0.01) if "Freeway" in args.env else {}
    parser.set_defaults(**config)
    args = argparse.Namespace(**vars(parser.parse_args(argv)) | dict(run=run, device=device, preset=config["preset"]))
    args.env = args.env if "/" in args.env else f"ALE/{args.env}-v5"
    args.game = re.sub(r".*/|-v\d+$", "", args.env)
    for name, value in vars(args).items():
        wanted, from_zero = f"--{name.replace('_', '-')}", name in MAY_BE_ZERO
        to_one, least = from_zero and isinstance(value, float), "at least" if from_zero else "above"  # shares, weights
        for x in value if isinstance(value, list) else [value]:
            if type(x) in (int, float) and not (0 < x < math.inf or x == 0 and from_zero) or to_one and x > 1:
                parser.error(f"{wanted} {x} is out of range: {least} 0{', at most 1' * to_one}")
        free = args.resume is None or name in ("resume", "run", "device", "mixed_precision", "compile")
        if not free and value != config.get(name):
            parser.error(f"{wanted} is {config.get(name)} in {run}, and a run goes on as it began")
    for wrong, why in ((not 2 <= args.horizon <= args.sequence_length, "--horizon must be 2 to --sequence-length"),
                       (args.width % args.heads, "--width must be a multiple of --heads"),
                       (args.tokenizer_channels % 32, "--tokenizer-channels must be a multiple of 32"),
                       (args.stem_stride * args.tokens_per_frame > 512, "64 --tokens-per-frame: --stem-stride up to 8"),
                       (args.starts != sorted(args.starts), "--starts must not fall: each part needs the one before")):
        if wrong:
            parser.error(why)
    return args

# ---- 2. Environment: real Atari frames, two hours of them ------------------------------------------------------------
def make_env(env_id, num_envs=1, training=True):
    """A gymnasium VectorEnv: observations (num_envs, 1, 64, 64, 3) uint8 RGB, discrete actions, ends as `terminations`,
    info["lives"], info["episode_frame_number"]. For a game of your own, change only this. InputError if unknown."""
    # ale-py's vector environment does all of it in C++, down to an area resize that keeps a one-pixel ball. Many of its
    # defaults are for other protocols, hence the list. In training a lost life ends the episode without restarting the
    # game; games begin with up to 30 no-ops and last up to 20,000 raw frames. In evaluation: none, and 108,000.
    try:
        return gym.make_vec(
            env_id, num_envs=num_envs, frameskip=4, img_height=64, img_width=64, grayscale=False, stack_num=1,
            repeat_action_probability=0.0, reward_clipping=False, use_fire_reset=False, life_loss_info=training,
            noop_max=30 if training else 1, max_num_frames_per_episode=20_000 if training else 108_000)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise InputError(f"--env {env_id}: {error}") from None

class Game:
    """Real games, one after another, played across epochs and across restarts of the program."""
    # Game number n is seeded with seed + n, and the emulator has no other randomness. So (n, actions since its start)
    # *is* its state: a checkpoint holds just that, and playing the actions again restores the emulator exactly.
    def __init__(self, env_id, seed):
        self.env, self.seed = make_env(env_id), seed
        self.num_actions = int(self.env.single_action_space.n)
        self.begin(0)

    def begin(self, number):
        """Starts game `number`. `frame` is what the player sees; `first` says that it opens an episode."""
        frames, _ = self.env.reset(seed=(self.seed + number) % 2**31)
        self.number, self.frame, self.first, self.actions, self.score = number, frames[0, 0], True, [], 0.0

    def step(self, action):
        """-> reward, end (running out of time is none), and the game's score if it is over, else None."""
        self.actions.append(action)
        frames, rewards, terminated, truncated, info = self.env.step(np.array([action]))
        reward, self.first, score = float(rewards[0]), bool(terminated[0] or truncated[0]), None
        if self.first:  # one no-op: the game goes on with the next life; or is over, and its frames count from 0 again
            frames, rewards, _, out_of_time, after = self.env.step(np.array([0]))
            reward += float(rewards[0])
        self.frame, self.score = frames[0, 0], self.score + reward
        if self.first and (out_of_time[0] or after["episode_frame_number"][0] < info["episode_frame_number"][0]):
            score = self.score
            self.begin(self.number + 1)
        return reward, bool(terminated[0]), score

# ---- 3. Replay: every real step, and what the tokenizer makes of it --------------------------------------------------
class Replay:
    """All real steps, in tensors on the device: for 100,000, 1.2 GB of frames and 2.5 (bfloat16) of reconstructions."""
    # Step i is a frame, the action taken on seeing it, the reward that followed and whether a life or the game ended.
    # `tokens` and `reconstructions` are what the tokenizer makes of the frames. It is frozen while the other two learn,
    # so this is computed once an epoch, where a plain loop encodes the frames of every batch again.
    def __init__(self, capacity, tokens_per_frame, dtype, device):
        column = partial(torch.zeros, device=device)
        self.frames = column(capacity, 64, 64, 3, dtype=torch.uint8)
        self.actions, self.ends, self.starts = column(3, capacity, dtype=torch.long)  # starts: episodes' first steps
        self.rewards, self.tokens = column(capacity), column(capacity, tokens_per_frame, dtype=torch.long)
        self.reconstructions = column(capacity, 3, 64, 64, dtype=dtype)  # all that the policy ever sees of a frame
        self.size, self.episodes = 0, 0

    def add(self, frame, action, reward, end, first):
        """Appends a step; `first` begins an episode with it."""
        self.frames[self.size] = torch.from_numpy(frame)
        self.actions[self.size], self.rewards[self.size], self.ends[self.size] = action, reward, end
        if first:
            self.starts[self.episodes] = self.size
            self.episodes += 1
        self.size += 1

    def sample(self, batch, steps, align):
        """Segments of T = `steps` steps -> index (B, T) into the columns, valid (B, T), false where padded."""
        # Episodes are drawn uniformly, not steps, so the steps of short ones, and ends, come up more often. The running
        # episode is one of them. Then one of its steps is drawn, as the first of the segment or as its last:
        #   align="start", the world model:   s  s+1  s+2  -   -     s drawn; padding on the right if the episode ends
        #   align="stop", the policy:         -   -    0  ... s      s drawn; padding on the left if it begins too late
        # Padding repeats the episode's edge; `valid` keeps it out of every loss.
        bounds = torch.cat([self.starts[:self.episodes], self.starts.new_full((1,), self.size)])  # (episodes + 1,)
        episode = torch.randint(self.episodes, (batch,), device=bounds.device)
        start, length = bounds[episode], bounds[episode + 1] - bounds[episode]  # (B,)
        drawn = (torch.rand(batch, device=bounds.device) * length).long().minimum(length - 1)
        first = drawn - (steps - 1 if align == "stop" else 0)
        position = first[:, None] + torch.arange(steps, device=bounds.device)  # (B, T), may stick out of the episode
        valid = (position >= 0) & (position < length[:, None])
        return start[:, None] + position.clamp(min=0).minimum(length[:, None] - 1), valid

def to_network(frames):
    """uint8 frames (..., 64, 64, 3) -> float (..., 3, 64, 64) in [-1, 1]."""
    return frames.movedim(-1, -3).contiguous().float() / 127.5 - 1  # a CPU's GroupNorms want it so

# ---- 4. Tokenizer: a frame is K words (a VQGAN's autoencoder without the GAN; section 2.1, appendix A.1) -------------
class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions beside the identity; (B, C, h, w) -> the same."""
    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, channels, eps=1e-6) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))

class SpatialAttention(nn.Module):
    """Single-head self-attention between the h x w places; (B, C, h, w) -> the same."""
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.qkv, self.proj_out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        # each (B, 1 head, h w, C), with the channels side by side in memory: else a GPU's fused attention declines
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()[:, None].chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))

class Tokenizer(nn.Module):
    """Discrete autoencoder: frames (N, 3, 64, 64) in [-1, 1] <-> tokens (N, K), a g x g grid read row by row."""
    def __init__(self, args):
        super().__init__()
        C, E, stride = args.tokenizer_channels, args.embed_dim, args.stem_stride
        self.grid = math.isqrt(args.tokens_per_frame)
        # Resolutions, halved from level to level; the paper's are 64, 32, 16, 8, 4. Layers are named "level_block".
        sizes = [size for size in (64, 32, 16, 8, 4) if self.grid <= size <= 64 // stride]
        def level(name, size, depth):
            layers = {}
            for i in range(depth):
                layers[f"{name}_block_{i}"] = ResBlock(C)
                if size in (8, 16):  # larger grids are too costly for attention, smaller ones have the middle's
                    layers[f"{name}_attn_{i}"] = SpatialAttention(C)
            return layers
        def middle():
            return dict(mid_block_1=ResBlock(C), mid_attn_1=SpatialAttention(C), mid_block_2=ResBlock(C))
        def output(n):
            return dict(norm_out=nn.GroupNorm(32, C, eps=1e-6), silu=nn.SiLU(), conv_out=nn.Conv2d(C, n, 3, padding=1))
        # A stem of stride s makes one place of s x s pixels; the decoder's PixelShuffle lays 3 s^2 channels out so.
        encoder = dict(conv_in=nn.Conv2d(3, C, stride + 2, stride, padding=1))
        for i, size in enumerate(sizes):  # downwards; the halving convolution is padded on the right and at the bottom
            encoder |= level(f"down_{i}", size, args.tokenizer_blocks)
            if size > self.grid:
                encoder[f"down_{i}_downsample"] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(C, C, 3, 2))
        decoder = dict(post_quant=nn.Conv2d(E, E, 1), conv_in=nn.Conv2d(E, C, 3, padding=1)) | middle()
        for i, size in reversed(list(enumerate(sizes))):  # and up again, one block deeper
            decoder |= level(f"up_{i}", size, args.tokenizer_blocks + 1)
            if i > 0:
                decoder[f"up_{i}_upsample"] = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 3, padding=1))
        self.encoder = nn.Sequential(OrderedDict(encoder | middle() | output(E), pre_quant=nn.Conv2d(E, E, 1)))
        self.decoder = nn.Sequential(OrderedDict(decoder | output(3 * stride ** 2), pixels=nn.PixelShuffle(stride)))
        self.codebook = nn.Embedding(args.vocab_size, E)
        nn.init.uniform_(self.codebook.weight, -1 / args.vocab_size, 1 / args.vocab_size)

    def quantize(self, z):
        """Latents (N, E, g, g) -> tokens (N, K): the nearest code of each place, by squared Euclidean distance."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would confuse neighbouring codes
            z, codes = z.float().flatten(2).transpose(1, 2), self.codebook.weight  # (N, K, E), (V, E)
            # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 does not change which code e is nearest
            return (codes.square().sum(1) - 2 * z @ codes.T).argmin(-1)

    def embed(self, tokens):
        """Tokens (N, K) -> their codes z_q (N, E, g, g)."""
        return self.codebook(tokens).transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def draw(self, tokens):
        """Tokens (N, K) -> frames (N, 3, 64, 64), clamped to [-1, 1], as the policy sees them."""
        return self.decoder(self.embed(tokens)).clamp(-1, 1)

    def look(self, frames):
        """Real frames (N, 64, 64, 3) uint8, any number -> their tokens (N, K), and these as drawn (N, 3, 64, 64)."""
        tokens = torch.cat([self.quantize(self.encoder(to_network(part))) for part in frames.split(256)])
        return tokens, torch.cat([self.draw(part) for part in tokens.split(256)])

    def loss(self, x, perceptual, reconstruction_loss):
        """Equation 1 on frames x (N, 3, 64, 64) in [-1, 1] -> loss, metrics. perceptual: LPIPS or None."""
        # L = |x - D(z_q)| + |sg(z) - z_q|^2 + |z - sg(z_q)|^2 + LPIPS(x, D(z_q)), all means; sg stops the gradient.
        z = self.encoder(x)  # (N, E, g, g)
        z_q = self.embed(self.quantize(z))
        # Straight through: the value is z_q, while the gradient passes to z as if nothing had been rounded.
        x_hat = self.decoder(z + (z_q - z).detach())
        codebook, commitment = F.mse_loss(z_q, z.detach()), F.mse_loss(z, z_q.detach())
        d = (x - x_hat).float()
        reconstruction = d.abs().mean() if reconstruction_loss == "l1" else d.square().mean()
        detail = d.new_zeros(()) if perceptual is None else perceptual(x, x_hat).mean()
        loss = reconstruction + codebook + commitment + detail
        return loss, dict(tokenizer_loss=loss, reconstruction_loss=reconstruction, codebook_loss=codebook,
                          commitment_loss=commitment, perceptual_loss=detail)

class LPIPS(nn.Module):
    """Perceptual distance: how differently a trained VGG16 sees two images (Zhang et al. 2018). Never trained here."""
    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: halve
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            channels = width or channels
        self.features = nn.Sequential(*layers)  # numbered as in torchvision, so that its weights fit
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in (64, 128, 256, 512, 512))
        normal = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])  # ImageNet's shift and scale
        self.register_buffer("normal", normal[..., None, None], persistent=False)
        self.requires_grad_(False)

    def see(self, h):
        """Images (N, 3, h, w) in [-1, 1] -> what the VGG16 sees on five scales, one after another."""
        h = (h - self.normal[0]) / self.normal[1]
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                yield F.normalize(h.float(), eps=1e-10)

    def forward(self, x, y):
        """Images x and y -> distances (N,), with a gradient for y only."""
        with torch.no_grad():
            seen = list(self.see(x))
        return sum(head((a - b).square()).mean((1, 2, 3)) for head, a, b in zip(self.heads, seen, self.see(y)))

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"

def load_lpips(wanted, device):
    """LPIPS with published weights, from torch hub's cache or the net; without them InputError, or None for "auto"."""
    fetch = partial(torch.hub.load_state_dict_from_url, map_location="cpu", weights_only=True, check_hash=True)
    try:  # check_hash compares the download with the hash in the file's name
        vgg, heads = fetch(VGG_URL), fetch(HEADS_URL, file_name="lpips_vgg-a78928a0.pth")
        weights = {name: value for name, value in vgg.items() if name.startswith("features.")}
        lpips = LPIPS()
        lpips.load_state_dict(weights | {f"heads.{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(5)})
        return lpips.to(device, memory_format=torch.channels_last)
    except Exception as error:  # no network, a wrong hash, a damaged file, a tensor missing: it cannot be had
        why = (f"LPIPS weights cannot be had ({error!r:.100}); put {VGG_URL} and {HEADS_URL} (as "
               f"lpips_vgg-a78928a0.pth) into {torch.hub.get_dir()}/checkpoints")
        if wanted == "lpips":
            raise InputError(why) from None
        print(f"no perceptual loss: {why}")

# ---- 5. World model: Atari as a language (a GPT; section 2.2, appendix A.2) ------------------------------------------
# Step i is its K = 16 frame tokens zi0 .. zif (hexadecimal), then its action ai. What each position predicts:
#   position     0    1  ...   14   15     16  |  17   18  ...   31   32     33  |  34
#   input       z00  z01 ...  z0e  z0f     a0  |  z10  z11 ...  z1e  z1f     a1  |  z20 ...
#   next token  z01  z02 ...  z0f    -    z10  |  z11  z12 ...  z1f    -    z20  |  z21 ...
#   reward, end                         r0, e0 |                          r1, e1 |
# z0f predicts no token: an action follows it, which is the policy's to choose. A token sees everything to its left.
class Block(nn.Module):
    """Pre-norm transformer block: (B, S, D) -> the same."""
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, cache=None, start=0):
        # Without a cache x is the whole sequence. With one, x are the positions start .. start + S - 1, and the cache
        # (2, B, nh, S_max, hs) holds the keys and values of all before them; those of x are written into it.
        B, S, D = x.shape
        qkv = self.qkv(self.ln1(x)).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, nh, S, hs)
        q, kv = qkv[0], qkv[1:]
        if cache is not None:
            cache[:, :, :, start:start + S] = kv
            kv = cache[:, :, :, :start + S]  # (2, B, nh, start + S, hs)
        # New position i sees the columns 0 .. start + i. A single new one sees all there are: no mask. At 0: causal.
        mask = x.new_ones(S, start + S, dtype=torch.bool).tril(start) if start > 0 and S > 1 else None
        y = F.scaled_dot_product_attention(q, *kv, attn_mask=mask, is_causal=start == 0,
                                           dropout_p=self.dropout if self.training else 0.0)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(B, S, D)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln2(x)), self.dropout, self.training)

class WorldModel(nn.Module):
    """GPT over frame tokens and actions, with heads for the next frame token, the reward and the end."""
    def __init__(self, args, num_actions):
        super().__init__()
        D, K, V = args.width, args.tokens_per_frame, args.vocab_size
        self.tokens_per_frame, self.reward_loss = K, args.reward_loss
        self.token_embedding, self.action_embedding = nn.Embedding(V, D), nn.Embedding(num_actions, D)
        self.pos_emb = nn.Embedding(args.sequence_length * (K + 1), D)  # learned, one for each place in a segment
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(D, args.heads, args.dropout) for _ in range(args.layers))
        self.ln_f = nn.LayerNorm(D)
        rewards = 3 if args.reward_loss == "cross-entropy" else 1  # classes are the signs -1, 0, 1
        self.head_token, self.head_reward, self.head_end = (
            nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, n)) for n in (V, rewards, 2))
        for name, p in self.named_parameters():
            if "ln" not in name:  # LayerNorms begin as the identity
                nn.init.normal_(p, 0.0, 0.02) if p.dim() > 1 else nn.init.zeros_(p)

    def embed(self, tokens, actions):
        """Tokens (B, T, K), actions (B, T) -> (B, S, D): every step's frame tokens, then its action."""
        return torch.cat([self.token_embedding(tokens), self.action_embedding(actions)[:, :, None]], 2).flatten(1, 2)

    def forward(self, x, caches=None, start=0):
        """Embedded positions start .. start + S - 1 (B, S, D) -> hidden states (B, S, D). Block explains caches."""
        x = self.dropout(x + self.pos_emb.weight[start:start + x.shape[1]])
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], start)
        return self.ln_f(x)

    def predict(self, tokens, actions):
        """Tokens (B, T, K), actions (B, T) -> logits of tokens (B, T K, V), rewards (B, T, 3 or 1), ends (B, T, 2)."""
        K = self.tokens_per_frame
        h = self(self.embed(tokens, actions)).unflatten(1, (-1, K + 1))  # (B, T, K + 1, D)
        predicting = torch.cat([h[:, :, :K - 1], h[:, :, K:]], dim=2)  # all but the frame's last token, see above
        return self.head_token(predicting).flatten(1, 2), self.head_reward(h[:, :, K]), self.head_end(h[:, :, K])

    def loss(self, tokens, actions, rewards, ends, valid):
        """Segments (B, T, ...), valid (B, T) -> loss, metrics: tokens, rewards and ends, each a mean over the valid."""
        token_logits, reward_logits, end_logits = (logits.float() for logits in self.predict(tokens, actions))
        # The i-th prediction is about the i+1-th frame token of the segment. The very first token is given; the last
        # action predicts a frame that is not in the segment. Targets of -100 are skipped by cross_entropy.
        targets = tokens.masked_fill(~valid[..., None], -100).flatten(1)[:, 1:]  # (B, T K - 1)
        token_loss = F.cross_entropy(token_logits[:, :-1].flatten(0, 1), targets.flatten())
        classes = (rewards.sign().long() + 1).masked_fill(~valid, -100)
        if self.reward_loss == "cross-entropy":
            reward_loss = F.cross_entropy(reward_logits.flatten(0, 1), classes.flatten())
        else:
            reward_loss = (valid * (reward_logits[..., 0] - rewards.sign()).square()).sum() / valid.sum()
        end_loss = F.cross_entropy(end_logits.flatten(0, 1), ends.masked_fill(~valid, -100).flatten())
        loss = token_loss + reward_loss + end_loss
        return loss, dict(token_loss=token_loss, reward_loss=reward_loss, end_loss=end_loss)

def sample(logits, u, temperature=1.0):
    """Logits (..., n), uniform numbers u (...) in [0, 1) -> classes (...), by inverting the cumulative distribution."""
    # One given number a draw: whatever samples is a plain function of its inputs, so a dream can be repeated, compared
    # with a slower implementation, and recorded as a CUDA graph.
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    return (cumulative[..., :-1] <= u[..., None] * cumulative[..., -1:]).sum(-1)  # the classes that u has passed

# ---- 6. Actor-critic: learns in dreams, plays for real (section 2.3, appendices A.3 and B) ---------------------------
class ActorCritic(nn.Module):
    """CNN and LSTM with a policy and a value head. Its memory, `state`, is a pair (h, c) of (B, L)."""
    def __init__(self, args, num_actions):
        super().__init__()
        layers, channels = [nn.AvgPool2d(args.policy_shrink)], 3  # shrink 1: nothing to do
        for width in (32, 32, 64, 64):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            channels = width
        self.cnn = nn.Sequential(*layers, nn.Flatten())  # (N, 3, 64, 64) -> (N, 1024), fewer if shrunk
        self.lstm = nn.LSTMCell(64 * (4 // args.policy_shrink) ** 2, args.lstm_size)
        self.actor, self.critic = nn.Linear(args.lstm_size, num_actions), nn.Linear(args.lstm_size, 1)
        # torch's initialisation lets through 1 to 3 % of what differs between frames: a nearly blind start.
        for p in self.cnn.parameters():
            nn.init.orthogonal_(p, math.sqrt(2)) if p.dim() > 1 else nn.init.zeros_(p)
        nn.init.orthogonal_(self.lstm.weight_ih)
        self.cnn.to(memory_format=torch.channels_last)  # half as fast again on a CPU; slower where there is a GroupNorm

    def initial_state(self, batch):
        """An empty memory."""
        return (self.actor.weight.new_zeros(batch, self.lstm.hidden_size),) * 2

    def forward(self, frames, state, valid=None):
        """Drawn frames (B, T, 3, 64, 64), memory before them -> logits (B, T, A), values (B, T), memory after them."""
        features, h = self.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).float(), []  # (B, T, 1024)
        with torch.autocast(frames.device.type, enabled=False):  # values and memory need more than bfloat16's 8 bits
            for t in range(frames.shape[1]):
                state = self.lstm(features[:, t], state)
                state = state if valid is None else tuple(x * valid[:, t, None] for x in state)  # padding: empty
                h.append(state[0])
            h = torch.stack(h, dim=1)  # (B, T, L)
            return self.actor(h), self.critic(h)[..., 0], state

    def loss(self, imagined, state, args):
        """A dream (see `dream`) and the memory at its start -> loss, metrics; appendix B."""
        # The dream was played without gradient; this pass over its frames has it, the same numbers up to rounding.
        (logits, values, _), ends = self(imagined["frames"], state), imagined["ends"]  # (B, H, A), (B, H), (B, H - 1)
        returns = lambda_returns(imagined["rewards"], values.detach(), ends, args.gamma, args.td_lambda)  # (B, H - 1)
        # What is dreamt after an end is worth nothing: it takes no part in any of the three losses.
        alive = (ends.cumsum(1) == ends).float()  # 1 up to and including the first end
        weight = alive / alive.sum()
        log_policy = logits[:, :-1].log_softmax(-1)  # (B, H - 1, A); of the last frame only the value counts
        log_chosen = log_policy.gather(-1, imagined["actions"][..., None])[..., 0]
        advantage = returns - values[:, :-1]
        policy_loss = -(weight * log_chosen * advantage.detach()).sum()  # REINFORCE with the value as baseline
        value_loss = (weight * advantage.square()).sum()
        entropy = -(weight[..., None] * log_policy.exp() * log_policy).sum()
        loss = policy_loss + value_loss - args.entropy_coef * entropy
        variance = (weight * (returns - (weight * returns).sum()).square()).sum()
        return loss, dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy,
                          explained_variance=1 - value_loss / (variance + 1e-8),
                          dream_return=(imagined["rewards"] * alive).sum(1).mean())

def lambda_returns(rewards, values, ends, gamma, lambda_):
    """Appendix B: rewards and ends (B, H - 1), values (B, H) -> returns (B, H - 1)."""
    # G_t = r_t + gamma (1 - end_t) ((1 - lambda) V_{t+1} + lambda G_{t+1}), from the back; G_{H-1} = V_{H-1}.
    returns, following = torch.empty_like(rewards), values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * (1 - ends[:, t]) * ((1 - lambda_) * values[:, t + 1] + lambda_ * following)
        returns[:, t] = following
    return returns

# ---- 7. Imagination: the world model as a game -----------------------------------------------------------------------
class Agent(nn.Module):
    """The three networks."""
    def __init__(self, args, num_actions):
        super().__init__()
        self.tokenizer, self.world_model = Tokenizer(args), WorldModel(args, num_actions)
        self.actor_critic = ActorCritic(args, num_actions)

    def act(self, frames, u, h, c, temperature):
        """Real frames (N, 64, 64, 3) uint8, uniform numbers (N,), memory -> actions (N,), new memory."""
        _, seen = self.tokenizer.look(frames)  # the policy knows no other frames
        logits, _, state = self.actor_critic(seen[:, None], (h, c))
        return sample(logits[:, 0], u, temperature), state

@torch.no_grad()  # the policy must not reshape its own dream
def dream(agent, tokens, past_actions, frame, state, u, actions=None):
    """Plays inside the world model, from the last of n real frames -> dict of frames (B, H, 3, 64, 64) and tokens
    (B, H, K), both beginning with that frame, actions, rewards and ends (B, H - 1).
      tokens (B, n, K), past_actions (B, n - 1): the real frames, and the actions between them; in training n = 1
      frame (B, 3, 64, 64), state: the last of them as drawn, and the policy's memory before seeing it
      u (B, H - 1, K + 3): uniform numbers; a step uses one for action, reward and end each, and K for tokens
      actions (B, H - 1): if given, played instead of the policy's"""
    # Keys and values of the past are cached, so that a new position costs one position. A frame's last token predicts
    # nothing and waits for the action; the two go in together, hence K passes for the K + 1 positions of a step.
    world_model, K = agent.world_model, agent.world_model.tokens_per_frame
    embedded = world_model.embed(tokens, F.pad(past_actions, (0, 1)))[:, :-1]  # all but the action to come
    prefix, last = embedded[:, :-1], embedded[:, -1]
    block, (positions, D) = world_model.blocks[0], world_model.pos_emb.weight.shape
    shape = len(world_model.blocks), 2, len(tokens), block.heads, positions, D // block.heads
    caches = block.qkv(last).new_zeros(shape)  # new_zeros of a qkv: in its precision, bfloat16 under autocast
    world_model(prefix, caches)  # fills the caches; what it predicts is already known
    dreamt = dict(frames=[frame], tokens=[tokens[:, -1]], actions=[], rewards=[], ends=[])
    for t in range(u.shape[1]):
        position = prefix.shape[1] + t * (K + 1)  # of `last`; the action is at the next, then come new tokens
        logits, _, state = agent.actor_critic(frame[:, None], state)
        action = sample(logits[:, 0], u[:, t, 0]) if actions is None else actions[:, t]
        pair = torch.stack([last, world_model.action_embedding(action)], dim=1)  # (B, 2, D)
        h = world_model(pair, caches, position)[:, -1]  # (B, D), at the action
        dreamt["actions"].append(action)
        reward = world_model.head_reward(h).float()  # (B, 3) logits of the signs, or (B, 1) with mse
        dreamt["rewards"].append(sample(reward, u[:, t, 1]).float() - 1 if reward.shape[1] == 3 else reward[:, 0])
        dreamt["ends"].append(sample(world_model.head_end(h), u[:, t, 2]).float())
        frame_tokens = []
        for k in range(K):
            frame_tokens.append(sample(world_model.head_token(h), u[:, t, 3 + k]))  # (B,)
            last = world_model.token_embedding(frame_tokens[-1])
            if k < K - 1:
                h = world_model(last[:, None], caches, position + 2 + k)[:, 0]
        dreamt["tokens"].append(torch.stack(frame_tokens, dim=1))
        frame = agent.tokenizer.draw(dreamt["tokens"][-1])
        dreamt["frames"].append(frame)
    return {name: torch.stack(steps, dim=1) for name, steps in dreamt.items()}

def fast(function, args):
    """Wraps a function of tensors: no gradient, mixed precision and, on a GPU, recorded once as a CUDA graph."""
    # A dream is tens of thousands of tiny kernels, each quicker to run than to launch. A CUDA graph records them once
    # and replays them in one go: the same arithmetic, without Python in between. Shapes must stay those of the first
    # call, and every call overwrites the outputs of the one before.
    def run(*inputs):
        # Autocast inside: its casts of the weights must be part of the graph, since the weights will change.
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.mixed_precision):
            return function(*inputs)
    graphs = []  # none yet: recorded at the first call
    def replay(*inputs):
        if not graphs:  # the clones are where later inputs will be copied to
            gc.collect()  # graphs of earlier evaluations are cyclic garbage that still holds GPU memory
            graphs.append(torch.cuda.make_graphed_callables(run, tuple(x.clone() for x in inputs)))
        return graphs[0](*inputs)
    return replay if args.device == "cuda" else run

# ---- 8. Checkpoints: a run's own, and the authors' -------------------------------------------------------------------
def write_atomically(path, data):
    """All of the bytes or none: no reader, and no power cut, ever meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def read_checkpoint(path):
    """A run folder, or a file -> the checkpoint, no code of it being run. InputError if it is missing or damaged."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # compares checksums; torch.load itself would take damaged weights
                raise ValueError("checksums differ")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # zipfile, pickle and torch have their own errors for a damaged file
        raise InputError(f"{path} is missing or damaged ({type(error).__name__}), or no checkpoint") from None

OFFICIAL_NAMES = (  # (pattern in our tensor names, what the authors' names have there), applied one after another
    (r"coder\.(down|up)_(\d)_(block|attn)_(\d)", r"coder.\1.\2.\3.\4"), (r"coder\.(down|up)_(\d)_", r"coder.\1.\2."),
    (r"coder\.mid_", "coder.mid."), (r"sample\.1", "sample.conv"), (r"..coder\.(p\w+)_quant", r"\1_quant_conv"),
    ("codebook", "embedding"), (r"(blocks\.\d+)\.(proj|qkv)\.", r"\1.attn.\2."), (r"(blocks|ln_f)", r"transformer.\1"),
    ("action_embedding", "embedder.embedding_tables.0"), ("token_embedding", "embedder.embedding_tables.1"),
    (r"cnn\.(\d+)", lambda match: f"conv{int(match[1]) // 3 + 1}"), (r"\.(actor|critic)\.", r".\1_linear."),
    ("head_token", "head_observations.head_module"), (r"head_(reward|end)\.", r"head_\1s.head_module."))

def rename_official(state_dict, names):
    """An authors' checkpoint (<Game>.pt) and our tensors' names -> the same weights as our state dict."""
    def fetch(name):  # the tensor that we call so; our fused qkv is three of theirs
        for pattern, theirs in OFFICIAL_NAMES:
            name = re.sub(pattern, theirs, name)
        parts = ("query", "key", "value") if "transformer" in name else ("q", "k", "v")
        return torch.cat([state_dict[name.replace("qkv", part)] for part in (parts if "qkv" in name else parts[:1])])
    return {name: fetch(name) for name in names}

def load_agent(args):
    """The agent that a run, or an authors' checkpoint, holds. InputError if it does not fit the flags."""
    state, agent = read_checkpoint(Path(args.run)), Agent(args, int(make_env(args.env).single_action_space.n)).eval()
    try:
        agent.load_state_dict(state["agent"] if "agent" in state else rename_official(state, agent.state_dict()))
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{args.run} does not fit the flags, or the game's actions: {str(error)[:150]}") from None
    return agent.to(args.device)

# ---- 9. Evaluation: whole real games, and how healthy each network is ------------------------------------------------
SCORES = dict(  # game: mean score of random play, of a human, and of IRIS (the paper's five seeds)
    Alien=(227.8, 7127.7, 420.02), Amidar=(5.8, 1719.5, 142.98), Assault=(222.4, 742, 1524.4),
    Asterix=(210, 8503.3, 853.6), BankHeist=(14.2, 753.1, 53.08), BattleZone=(2360, 37187.5, 13074),
    Boxing=(0.1, 12.1, 70.06), Breakout=(1.7, 30.5, 83.66), ChopperCommand=(811, 7387.8, 1565),
    CrazyClimber=(10780.5, 35829.4, 59324.2), DemonAttack=(152.1, 1971, 2034.36), Freeway=(0, 29.6, 31.06),
    Frostbite=(65.2, 4334.7, 259.12), Gopher=(257.6, 2412.5, 2236.12), Hero=(1027, 30826.4, 7037.4),
    Jamesbond=(29, 302.8, 462.7), Kangaroo=(52, 3035, 838.2), Krull=(1598, 2665.5, 6616.42),
    KungFuMaster=(258.5, 22736.3, 21759.8), MsPacman=(307.3, 6951.6, 999.06), Pong=(-20.7, 14.6, 14.6),
    PrivateEye=(24.9, 69571.3, 100), Qbert=(163.9, 13455, 745.72), RoadRunner=(11.5, 7845, 9614.6),
    Seaquest=(68.4, 42054.7, 661.32), UpNDown=(533.4, 11693.2, 3546.2))

def evaluate(agent, args, games, enough=None):
    """Plays whole games -> scores (games,), [frames, actions, rewards, ends] of game 0; stops at `enough` frames."""
    # Every game has its own seed for the emulator and its own stream of random numbers for the policy, and every game
    # counts. So a return depends, up to rounding, neither on how many are played side by side nor on which end first.
    env, device, numbers = make_env(args.env, games, training=False), torch.device(args.device), np.arange(games)
    act, recording = fast(partial(agent.act, temperature=args.eval_temperature), args), []
    streams, state = [np.random.default_rng([args.seed, n]) for n in numbers], agent.actor_critic.initial_state(games)
    frames, info = env.reset(seed=(args.seed * 100_000 + 50_000 + numbers) % 2**31)  # not training's games
    returns, playing = np.zeros(games), np.ones(games, bool)
    while playing.any() and len(recording) != enough:
        u = torch.tensor([stream.random() for stream in streams], dtype=torch.float32, device=device)
        actions, state = act(torch.from_numpy(frames[:, 0]).to(device), u, *state)
        print(f"\r{playing.sum()} of {games} games are running \r" * sys.stderr.isatty(), end="", file=sys.stderr)
        taken, before, lives = actions.cpu().numpy(), frames, info["lives"]
        frames, rewards, terminated, truncated, info = env.step(taken)
        returns += rewards * playing  # a game that is over waits for the others; what its slot does is ignored
        if playing[0] and len(recording) < 1000:
            end = terminated[0] or info["lives"][0] < lives[0]  # as in training
            recording.append((before[0, 0].copy(), taken[0], np.float32(rewards[0]), np.int64(end)))
        playing &= ~(terminated | truncated)
    return returns, [torch.from_numpy(np.stack(column)).to(device) for column in zip(*recording)]

@torch.no_grad()
def held_out_metrics(agent, recording, T):
    """The networks on real play that they were not trained on, cut into segments of T steps -> metrics."""
    count = len(recording[0]) // T
    frames, actions, rewards, ends = (column[:count * T] for column in recording)
    tokens, drawn = agent.tokenizer.look(frames)  # (count T, K), (count T, 3, 64, 64)
    # The tokenizer: what moves is a small part of a frame, so a good mean error can hide that it is all missing.
    x = to_network(frames)
    error, contrast = (drawn - x).abs(), (x - x.median(dim=0).values).abs()  # contrast: if only background were drawn
    moving = (contrast > 0.2).float()
    metrics = dict(heldout_psnr=-10 * (error / 2).square().mean().log10(),
                   moving_kept=1 - (moving * error).sum() / (moving * contrast).sum().clamp(min=1))
    # The world model must beat "each token stays what it was a frame ago". As a forecast with probabilities, copying
    # gives the copied token its own accuracy, known in hindsight, and spreads the rest evenly over the others.
    tokens, actions = tokens.unflatten(0, (count, T)), actions.unflatten(0, (count, T))
    logits, reward, end = agent.world_model.predict(tokens, actions)
    logits = logits[:, tokens.shape[-1] - 1:-1].flatten(0, 1)  # those about the frames 1 .. T - 1
    targets, copies = tokens[:, 1:].flatten(), tokens[:, :-1].flatten()
    copied = (copies == targets).float().mean().clamp(1e-3, 1 - 1e-3)
    metrics |= dict(
        token_accuracy=(logits.argmax(1) == targets).float().mean(), copy_accuracy=copied,
        token_cross_entropy=F.cross_entropy(logits, targets),
        copy_cross_entropy=-copied * copied.log() - (1 - copied) * ((1 - copied) / (logits.shape[1] - 1)).log())
    # Rewards and ends are rare: never to predict one has a low loss, and teaches the policy nothing.
    signs = reward.argmax(-1) - 1 if reward.shape[-1] == 3 else reward[..., 0].round().sign()
    for name, told, real in (("reward", signs.flatten(), rewards.sign()), ("end", end.argmax(-1).flatten(), ends)):
        hits, came = ((told == real) & (real != 0)).sum(), (real != 0).sum()
        metrics |= {f"{name}_count": came, f"{name}_recall": hits / came.clamp(min=1),
                    f"{name}_precision": hits / (told != 0).sum().clamp(min=1)}
    return {name: float(value) for name, value in metrics.items()}

def evaluation(agent, args, games, folder, name):
    """Plays, measures the networks, draws game 0, keeps the scores (in eval.json if `name` is "final") -> metrics."""
    returns, recording = evaluate(agent, args, games)
    metrics = dict(eval_return=float(returns.mean()), eval_std=float(returns.std()),
                   **held_out_metrics(agent, recording, min(args.sequence_length, len(recording[0]))))
    random, human, iris = SCORES.get(args.game, (math.nan,) * 3)
    print((f"{args.game}, {games} games: mean {returns.mean():.1f}, standard deviation {returns.std():.1f}; random "
           f"{random:g}, human {human:g}, IRIS {iris:g}, normalised {(returns.mean() - random) / (human - random):.3f}"
           ).replace("nan", "-"))  # a game outside the 26 has its raw score only
    result = json.dumps(dict(game=args.game, returns=returns.tolist(), **metrics), indent=1).encode()
    write_atomically(folder / ("eval.json" if name == "final" else f"media/{name}/returns.json"), result)
    write_pictures(agent, args, recording, folder / "media" / name)
    return metrics

def report(folder):
    """Prints, in markdown, all runs below a folder that have an eval.json, and what they say together."""
    runs, games = {}, []
    for path in sorted(folder.rglob("eval.json")):
        try:
            result = json.loads(path.read_text())
            runs.setdefault(result["game"], []).append(float(np.mean(result["returns"])))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r:.80}): evaluate its run again, or take it away") from None
    if not runs:
        raise InputError(f"--report {folder}: no run below it has an eval.json")
    print("| game | seeds | mean (each seed) | human-normalised | random | human | IRIS |\n" + "| --- " * 7 + "|")
    for game, means in sorted(runs.items()):
        random, human, iris = SCORES.get(game, (math.nan,) * 3)
        normalised = (np.array(means) - random) / (human - random)  # (seeds,)
        games += [normalised] if game in SCORES else []
        print(f"| {game} | {len(means)} | {np.mean(means):.1f} ({', '.join(f'{x:.1f}' for x in means)}) | "
              f"{normalised.mean():.3f} | {random:g} | {human:g} | {iris:g} |".replace("nan", "-"))
    if games:  # 95 % intervals as in Agarwal et al. 2021: within each game, its seeds are drawn again, with replacement
        rng = np.random.default_rng(0)
        draws = [aggregate([rng.choice(game, len(game)) for game in games]) for _ in range(2000)]
        low, high = np.percentile(draws, (2.5, 97.5), axis=0)
        print(f"\n| over {len(games)} games | value | 95 % interval |\n| --- | --- | --- |")
        for row in zip(("mean", "median", "interquartile mean", "optimality gap", "games above human"),
                       aggregate(games), low, high):
            print("| {} | {:.3f} | {:.3f} to {:.3f} |".format(*row))

def aggregate(games):
    """Human-normalised scores (seeds,) of each game -> mean, median, interquartile mean, optimality gap, games > 1."""
    means, runs = np.array([game.mean() for game in games]), np.sort(np.concatenate(games))
    middle = runs[len(runs) // 4:len(runs) - len(runs) // 4]
    return means.mean(), np.median(means), middle.mean(), 1 - runs.clip(max=1).mean(), (means > 1).sum()

# ---- 10. Pictures: a world model is something to look at -------------------------------------------------------------
def to_pixels(frames):
    """Frames (..., 3, 64, 64) in [-1, 1] -> (..., 64, 64, 3) uint8 in numpy."""
    return ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()

def picture(rows, scale=3, margin=130):
    """[(label, frames (n, 64, 64, 3) uint8, captions below them)] -> one BGR image, a row each, its pixels enlarged."""
    lines = []
    for label, frames, captions in rows:
        strip = np.concatenate(list(frames), axis=1).repeat(scale, 0).repeat(scale, 1)
        line = cv2.copyMakeBorder(strip, 4, 18 * bool(captions), margin, 0, cv2.BORDER_CONSTANT, value=(24, 24, 24))
        corners = [(margin + 64 * scale * i + 4, 64 * scale + 16) for i in range(len(captions))]
        for text, corner in zip((label, *captions), ((6, 36 * scale), *corners)):  # the label in the margin
            cv2.putText(line, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235, 235, 235), 1, cv2.LINE_AA)
        lines.append(line)
    return cv2.cvtColor(np.concatenate(lines), cv2.COLOR_RGB2BGR)

@torch.no_grad()
def write_pictures(agent, args, recording, folder):
    """Four pictures and a video of a recorded real game, as the tokenizer and the world model see it."""
    (frames, actions, rewards, ends), n = recording, len(recording[0])
    T, H = args.sequence_length, min(args.horizon, n)
    real, generator = frames.cpu().numpy(), torch.Generator().manual_seed(0)
    tokens, drawn = agent.tokenizer.look(frames)  # (n, K), (n, 3, 64, 64)
    def write(name, *rows):
        write_atomically(folder / f"{name}.png", cv2.imencode(".png", picture(rows))[1])
    def imagine(tokens, past_actions, frame, count, steps, given=None):  # `count` dreams after one past
        u = torch.rand(count, steps, args.tokens_per_frame + 3, generator=generator).to(args.device)
        past = (x.expand(count, *x.shape) for x in (tokens, past_actions, frame))
        return dream(agent, *past, agent.actor_critic.initial_state(count), u, given)
    # The tokenizer, on frames from all over the game: what is lost here, nothing later can know.
    some = np.linspace(0, n - 1, 10).astype(int)
    rebuilt = to_pixels(drawn[some])
    write("reconstructions", ("real", real[some], ()), ("reconstructed", rebuilt, ()),
          ("difference", cv2.absdiff(real[some], rebuilt), ()))
    # The world model, around the first reward. From one real frame, given the actions that followed, it should dream
    # what really happened; when the policy chooses the actions, it dreams other futures of that frame.
    scored = rewards.nonzero().flatten().tolist() + [n // 2]  # none: the middle
    first = max(0, min(scored[0] - H // 2, n - H))
    window, start = slice(first, first + H), (tokens[first:first + 1], actions[:0], drawn[first])
    same = to_pixels(imagine(*start, 1, H - 1, actions[None, first:first + H - 1])["frames"])
    write("dream", ("real", real[window], ()), ("dreamt", same[0], ()))
    futures = to_pixels(imagine(*start, 4, H - 1)["frames"])
    write("futures", *((f"future {i + 1}", future, ()) for i, future in enumerate(futures)))
    # What it expects of these real steps, below what came: the reward's sign, and how likely the episode ends.
    _, reward, end = (x[0] for x in agent.world_model.predict(tokens[None, window], actions[None, window]))
    chances = reward.softmax(-1)  # (H, 3) for the signs -1, 0, 1
    expected = chances[:, 2] - chances[:, 0] if reward.shape[-1] == 3 else reward[:, 0]
    came, told = ([f"reward {r:+.2f} end {e:.2f}" for r, e in zip(*pair)] for pair in (
        (rewards[window].sign(), ends[window]), (expected, end.softmax(-1)[:, 1])))
    write("rewards", ("real", real[window], came), ("expected", to_pixels(drawn[window]), told))
    # Far beyond the training horizon: the dream goes on from its own last frames, given the actions really played.
    words, clip, steps = tokens[:1], [drawn[0]], T - T // 2
    while len(clip) + steps <= min(n, 10 * H):
        t, known = len(clip), min(len(clip), T // 2)
        given = actions[None, t - 1:t - 1 + steps]  # action t - 1 was taken on the last of the t frames so far
        more = imagine(words[-known:], actions[t - known:t - 1], clip[-1], 1, steps, given)
        words, clip = torch.cat([words, more["tokens"][0, 1:]]), clip + list(more["frames"][0, 1:])
    images = [picture([("", np.stack([x, to_pixels(y)]), ("real", "dreamt"))], 6, 0) for x, y in zip(real, clip)]
    writer = cv2.VideoWriter(str(folder / "dream.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 15, images[0].shape[1::-1])
    for image in images:
        writer.write(image)
    writer.release()

KEYS = dict(FIRE="f", UP="w", LEFT="a", DOWN="s", RIGHT="d", UPLEFT="t", UPRIGHT="y", DOWNLEFT="g", DOWNRIGHT="h")

@torch.no_grad()
def play(agent, args):
    """The world model as a game, in a window; you are the policy. Shift adds FIRE to a direction."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise InputError("--play opens a window, and there is no display to open it on (--dream writes pictures)")
    names = gym.make(args.env).unwrapped.get_action_meanings()
    keys = [KEYS[name] if name in KEYS else KEYS[name.removesuffix("FIRE")].upper() for name in names[1:]]  # 0: NOOP
    print(", ".join(f"{key} {name}" for key, name in zip(keys, names[1:])),
          "r start from another real frame, space pause, q quit", sep="; ", flush=True)
    frames = evaluate(agent, args, 1, enough=300)[1][0]
    T, paused, key = args.sequence_length, False, ord("r")
    while key != ord("q"):
        if key == ord("r"):
            words, frame = agent.tokenizer.look(frames[torch.randint(len(frames), (1,))])
            tokens, past, score, end = words[None], words[:, :0], 0.0, False  # (1, 1, K), (1, 0)
        elif not paused and not end:
            action = past.new_tensor([[keys.index(chr(key)) + 1 if chr(key) in keys else 0]])
            u = torch.rand(1, 1, args.tokens_per_frame + 3, device=past.device)
            dreamt = dream(agent, tokens, past, frame, agent.actor_critic.initial_state(1), u, action)
            tokens = torch.cat([tokens, dreamt["tokens"][:, 1:]], dim=1)[:, 1 - T:]  # T - 1 frames at most
            past, frame = torch.cat([past, action], 1)[:, past.shape[1] + 2 - tokens.shape[1]:], dreamt["frames"][:, 1]
            score, end = score + float(dreamt["rewards"]), bool(dreamt["ends"])
        caption = f"rewards {score:+g}" + ", the end: press r" * end + ", paused" * paused
        cv2.imshow("iris", picture([("", to_pixels(frame), (caption,))], 8, 0))
        key = cv2.waitKey(66) & 255  # 15 frames a second, less the dream's time; 255: no key
        paused ^= key == ord(" ")

# ---- 11. Training: collect, then train the three parts, epoch after epoch --------------------------------------------
class Training:
    """All that a run consists of. The phases of an epoch are methods that return metrics; train() is the schedule."""
    def __init__(self, args, folder):
        self.args, self.folder, self.device = args, folder, torch.device(args.device)
        torch.manual_seed(args.seed)
        self.game = Game(args.env, args.seed * 100_000)
        self.agent = load_agent(args) if args.resume else Agent(args, self.game.num_actions).eval().to(self.device)
        self.perceptual = None if args.perceptual_loss == "none" else load_lpips(args.perceptual_loss, args.device)
        args.perceptual_loss = "lpips" if self.perceptual else "none"  # for config.json
        if args.reconstruction_loss == "auto":  # without LPIPS, squares learn small moving things much sooner
            args.reconstruction_loss = "l1" if self.perceptual else "l2"
        self.amp = torch.autocast(args.device, torch.bfloat16, enabled=args.mixed_precision)
        self.replay = Replay(args.collect_epochs * args.collect_steps, args.tokens_per_frame,
                             torch.bfloat16 if args.mixed_precision else torch.float32, self.device)
        # Adam. Weight decay (hence AdamW) pulls on the transformer's matrices only: not on embeddings, biases, gains.
        self.optimizers = {}
        for (part, network), rate in zip(self.agent.named_children(), args.learning_rates):  # in the flags' order
            groups = dict(params=[], weight_decay=0.0), dict(params=[], weight_decay=0.01)  # picked by 0 or 1
            for name, p in network.named_parameters():
                groups[part == "world_model" and p.dim() == 2 and "emb" not in name]["params"].append(p)
            self.optimizers[part] = torch.optim.AdamW(groups, rate, fused=True)
        if args.compile:  # fuses what stands between matrix products; compiling takes minutes, so only if asked for
            for network in self.agent.children():
                network.loss = torch.compile(network.loss, dynamic=False)  # of one or two shapes
        self.act = fast(partial(self.agent.act, temperature=args.temperature), args)
        self.imagine = fast(self.imagine, args)  # the method below, from here on as a graph
        self.epoch, self.history = 0, []

    def collect(self):
        """Real steps, into the replay. The policy has changed, so its memory of the running episode is made anew."""
        args, replay, game, scores = self.args, self.replay, self.game, []
        empty = state = self.agent.actor_critic.initial_state(1)
        begun = replay.size if game.first else int(replay.starts[replay.episodes - 1])
        for frame in replay.frames[max(begun, replay.size - args.burn_in):replay.size]:
            _, state = self.act(frame[None], torch.zeros(1, device=self.device), *state)
        for _ in self.progress(range(args.collect_steps), "collect"):
            frame, first = game.frame, game.first
            luck, which, u = torch.rand(3)
            action, state = self.act(torch.from_numpy(frame)[None].to(self.device), u[None].to(self.device),
                                     *(empty if first else state))  # a new episode: nothing to remember
            action = int(which * game.num_actions) if luck < args.epsilon else int(action)
            reward, end, score = game.step(action)
            replay.add(frame, action, reward, end, first)
            scores += [] if score is None else [score]
        return dict(train_return=float(np.mean(scores))) if scores else {}

    def optimize(self, part):
        """An epoch's updates of one network, each on its own loss -> means of the metrics (of a batch's last piece)."""
        args, network, optimizer, history = self.args, getattr(self.agent, part), self.optimizers[part], []
        network.train()
        for i in self.progress(range(dict(zip(self.optimizers, args.updates))[part]), part):
            if part == "tokenizer" and args.revive_codes and i % args.revive_codes == 0:
                self.revive_codes()
            optimizer.zero_grad()
            for share, inputs in self.batch(part):
                with self.amp:
                    loss, metrics = network.loss(*inputs)
                (share * loss).backward()
            metrics[f"{part}_grad_norm"] = nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()  # of this network only: the policy must not reshape the world that it dreams
            history.append({name: value.detach() for name, value in metrics.items()})
        network.eval()  # no dropout in dreams
        # Read only now: every reading waits for the GPU, and while Python runs ahead of it, the GPU is never idle.
        return {name: float(torch.stack([metrics[name] for metrics in history]).mean()) for name in history[0]}

    def batch(self, part):
        """What the loss of a network is computed on, real frames, segments or dreams, in pieces: [(share, inputs)]."""
        args, replay, size = self.args, self.replay, dict(zip(self.optimizers, self.args.batches))[part]
        if part == "tokenizer":
            index, _ = replay.sample(size, 1, "start")  # 64 at a time: the same gradient in a quarter of the memory
            pieces = to_network(replay.frames[index[:, 0]]).split(64)
            return [(len(x) / size, (x, self.perceptual, args.reconstruction_loss)) for x in pieces]
        if part == "world_model":
            index, valid = replay.sample(size, args.sequence_length, "start")
            return [(1, (*(x[index] for x in (replay.tokens, replay.actions, replay.rewards, replay.ends)), valid))]
        index, valid = replay.sample(size, args.burn_in + 1, "stop")
        u = torch.rand(size, args.horizon - 1, args.tokens_per_frame + 3, device=self.device)
        return [(1, (*self.imagine(index, valid, u), args))]

    def imagine(self, index, valid, u):
        """Segments of burn_in + 1 real frames, uniform numbers -> the dream that follows them, the memory before it."""
        #     padding | real frames, for the policy's memory | the last one | H - 1 dreamt frames
        #      skipped   burn-in, without gradient              acts on it     acts on all but the last
        seen, empty = self.replay.reconstructions[index], self.agent.actor_critic.initial_state(len(index))
        *_, state = self.agent.actor_critic(seen[:, :-1], empty, valid[:, :-1])
        return dream(self.agent, self.replay.tokens[index[:, -1:]], index[:, :0], seen[:, -1], state, u), state

    @torch.no_grad()
    def revive_codes(self):
        """Moves each code that 256 frames do not use onto one of their latents, preferably a badly coded one."""
        tokenizer, codes = self.agent.tokenizer, self.agent.tokenizer.codebook.weight
        index, _ = self.replay.sample(256, 1, "start")
        z = tokenizer.encoder(to_network(self.replay.frames[index[:, 0]]))
        tokens, latents = tokenizer.quantize(z).flatten(), z.flatten(2).transpose(1, 2).flatten(0, 1)  # (N,), (N, E)
        unused = tokens.bincount(minlength=len(codes)) == 0
        # Most latents are background, which has its codes. Chances by squared distance to the own code, as in
        # k-means++, find those that do not; clamped so that a diverging run fails at the loss check, not here.
        distance = (latents - codes[tokens]).square().sum(1).nan_to_num(0, 1, 0).clamp(1e-12, 1e30)
        picked = latents[torch.multinomial(distance, len(codes), replacement=True)]
        codes.copy_(torch.where(unused[:, None], picked, codes))

    @torch.no_grad()
    def tokenize_replay(self):
        """What the next two phases need of the tokenizer, once for every frame: it does not change under them."""
        replay = self.replay
        for start in self.progress(range(0, replay.size, 256), "tokens"):
            part = slice(max(0, min(start, replay.size - 256)), min(start + 256, replay.size))  # all of one size
            with self.amp:
                replay.tokens[part], replay.reconstructions[part] = self.agent.tokenizer.look(replay.frames[part])
        return dict(codes_in_use=len(replay.tokens[:replay.size].unique()))

    def progress(self, work, label):
        """Iterates over `work`, keeping a line on the terminal with what is done and how long the rest will take."""
        live, begun, shown = sys.stderr.isatty(), time.time(), time.time()
        for done, item in enumerate(work, start=1):
            yield item
            if live and time.time() - shown > 0.5:
                shown = time.time()
                line = f"{label} {done}/{len(work)}, {(shown - begun) * (len(work) / done - 1):.0f} s left"
                print(f"\r{f'epoch {self.epoch}: {line}':70}", end="", file=sys.stderr, flush=True)
        print(f"\r{'':70}\r" * live, end="", file=sys.stderr, flush=True)

    def save(self):
        """The state after a whole epoch, and metrics.csv, a row an epoch."""
        names = list(dict.fromkeys(name for row in self.history for name in row))
        lines = [names] + [[str(row.get(name, "")) for name in names] for row in self.history]
        write_atomically(self.folder / "metrics.csv", "".join(",".join(line) + "\n" for line in lines).encode())
        # Each epoch's frames get a file of their own, 2.5 MB where a checkpoint with all would be 1.2 GB. It is named
        # after its first step, so an epoch that was killed and is played again replaces it.
        start, buffer = max(0, self.replay.size - self.args.collect_steps), io.BytesIO()
        new = self.replay.frames[start:self.replay.size].cpu().numpy()
        write_atomically(self.folder / "frames" / f"{start:07d}.bin", new.tobytes())
        torch.save(dict(
            args=vars(self.args), epoch=self.epoch, history=self.history, agent=self.agent.state_dict(),
            optimizers={part: optimizer.state_dict() for part, optimizer in self.optimizers.items()},
            game=self.game.number, actions=self.game.actions, replay={  # all but what is in files, or computed anew
                name: getattr(self.replay, name) for name in (
                    "size", "episodes", "starts", "actions", "rewards", "ends")}), buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer())

    def load(self):
        """Continues from the run's checkpoint."""
        state = read_checkpoint(self.folder)
        self.epoch, self.history, size = state["epoch"], state["history"], state["replay"]["size"]
        for part, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][part])
        for name, value in state["replay"].items():
            setattr(self.replay, name, value.to(self.device) if torch.is_tensor(value) else value)
        self.game.begin(state["game"])
        for action in state["actions"]:
            self.game.step(action)
        files = [file for file in sorted((self.folder / "frames").glob("[0-9]*.bin")) if int(file.stem) < size]
        frames = np.concatenate([np.empty(0, np.uint8), *(np.fromfile(file, np.uint8) for file in files)])
        if len(frames) != size * 64 * 64 * 3:
            raise InputError(f"{self.folder / 'frames'} does not hold the checkpoint's {size} frames: it is damaged")
        self.replay.frames[:size] = torch.from_numpy(frames).view(-1, 64, 64, 3)

def train(args, folder):
    """The whole run: the phases of every epoch in order, a checkpoint after each epoch, the final evaluation."""
    run = Training(args, folder)  # first: whatever is wrong with the flags shows before anything is written
    if args.resume:
        run.load()
    else:
        (folder / "frames").mkdir(parents=True)
        write_atomically(folder / "config.json", json.dumps(vars(args), indent=1).encode())  # for people to read
        run.save()
    if board := importlib.util.find_spec("tensorboard"):  # welcome, not needed
        board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)
    sizes = [f"{part} {sum(p.numel() for p in net.parameters()):,}" for part, net in run.agent.named_children()]
    print(f"{folder}: {args.env} on {args.device} in {'bfloat16' if args.mixed_precision else 'float32'}; parameters: "
          f"{', '.join(sizes)}; {args.preset} preset" + ", half an hour on two CPU cores" * (args.preset == "small"),
          flush=True)
    while run.epoch < args.epochs:
        run.epoch += 1
        torch.manual_seed(args.seed * 100_000 + run.epoch)  # an epoch's luck is its own: no generator state to keep
        row, begun, (first, second, third) = dict(epoch=run.epoch), time.time(), args.starts
        for name, start, stop, phase in (("collect", 1, args.collect_epochs, run.collect),
                                         ("tokenizer", first, args.tokenizer_stop, partial(run.optimize, "tokenizer")),
                                         ("tokens", second, args.epochs, run.tokenize_replay),
                                         ("world_model", second, args.epochs, partial(run.optimize, "world_model")),
                                         ("actor_critic", third, args.epochs, partial(run.optimize, "actor_critic"))):
            if start <= run.epoch <= stop:
                started = time.time()
                row.update(phase())
                row[f"seconds_{name}"] = time.time() - started
        if run.epoch % args.eval_every == 0:
            row.update(evaluation(run.agent, args, args.eval_games, folder, f"epoch_{run.epoch:03d}"))
        row |= dict(real_steps=run.replay.size, seconds=time.time() - begun, memory=torch.cuda.max_memory_allocated(),
                    steps_a_second=args.collect_steps / row.get("seconds_collect", math.inf))
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"{broken[0]} is not finite in epoch {run.epoch}; {folder} keeps the epoch before")
        run.history.append(row)
        run.save()
        told = {"tokenizer_loss", "token_loss", "entropy", "dream_return", "train_return"} & row.keys()
        left = f"{(args.epochs - run.epoch) * row['seconds'] / 60:.0f} min left{' or more' * (run.epoch < third)}"
        print(f"epoch {run.epoch}/{args.epochs}: {', '.join(f'{name} {row[name]:.3g}' for name in sorted(told))}; "
              f"{row['seconds']:.0f} s, {left}", flush=True)
        for name, value in row.items() if board else ():
            board.add_scalar(name, value, run.epoch)
    evaluation(run.agent, args, args.final_games, folder, "final")

# ---- 12. Command line ------------------------------------------------------------------------------------------------
def main(argv=None):
    """Command line -> exit code: 0 done, 1 training diverged, 2 bad input, 130 stopped."""
    folder = None
    try:
        args = parse_args(argv)
        torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not args.torch_deterministic
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan each of a dream's some 300 shapes
        if args.report:
            report(Path(args.report))
        elif args.play:
            play(load_agent(args), args)
        elif args.dream or args.eval:
            agent, path = load_agent(args), Path(args.run)
            results = path if path.is_dir() else path.with_suffix(".results")  # beside an authors' Pong.pt
            if args.eval:
                evaluation(agent, args, args.final_games, results, "final")
            else:
                write_pictures(agent, args, evaluate(agent, args, 1, enough=1000)[1], results / "media" / "dream")
        else:
            name = f"{args.game}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
            folder = Path(args.run or Path(args.run_dir) / name)
            train(args, folder)
        return 0
    except (InputError, OSError, FloatingPointError, KeyboardInterrupt, torch.OutOfMemoryError, cv2.error) as error:
        code, message = {FloatingPointError: 1, KeyboardInterrupt: 130}.get(type(error), 2), str(error) or "stopped"
        if isinstance(error, (OSError, KeyboardInterrupt)) and folder and os.path.exists(folder):
            message += f"; go on with python iris.py --resume {folder}"
        print(f"iris.py: {' '.join(message.split())}", file=sys.stderr)
        return code

if __name__ == "__main__":
    sys.exit(main())
