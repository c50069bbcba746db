#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""IRIS in one file: an agent that learns Atari inside its own dreams.

    python iris.py --env Pong                train; ends with an evaluation and its pictures
    python iris.py --resume runs/NAME        go on, exactly where a run stopped

The paper is "Transformers are Sample-Efficient World Models" (Micheli, Alonso, Fleuret, ICLR 2023, arXiv:2209.00588);
sections, equations and appendices cited below are its.
"""
# A discrete autoencoder turns every frame into a few tokens, so a game becomes a text. A GPT learns how that text goes
# on: next frame, reward, end. Sampling from the GPT is a dream of the game, and the policy learns in dreams only. Two
# hours of real play feed the autoencoder and the GPT, nothing else.
#
#      real frame                                        reward, end, next frame's tokens
#          |  encoder                                              ^
#      K = 16 tokens of 512 words  ------------->  transformer over T = 20 steps of K + 1 tokens
#          |  decoder                                              ^
#      reconstructed frame  ---->  actor-critic (CNN, LSTM)  ----> action
#
# Read it top to bottom: 1 flags, 2 environment, 3 replay, 4 tokenizer, 5 world model, 6 actor-critic, 7 imagination,
# 8 the authors' checkpoints, 9 evaluation and pictures, 10 training, 11 command line. A letter has one meaning:
# B batch, T time steps, K tokens a frame, S = T (K + 1) positions, D width of the transformer, V vocabulary, E size of
# a code, g = sqrt(K) side of the token grid, C channels, A actions, L size of the LSTM, H frames of a dream.
import argparse
import io
import json
import math
import os
import re
import resource
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: beside other programs, spinning threads crawl

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # TensorBoard is welcome, not needed
    SummaryWriter = None

gym.register_envs(ale_py)

class InputError(ValueError):
    """Something the user gave cannot work. The message says what, and what to do; main() prints it and exits with 2."""


# ---- 1. Flags: every number of the paper in one place ----------------------------------------------------------------
# The defaults are the paper's. SMALL is what two CPU cores can do in half an hour: the same algorithm with smaller
# networks on a shorter schedule. A flag given on the command line overrides either.
SMALL = dict(
    epochs=15, collect_epochs=14, collect_steps=400, eval_every=6, eval_games=2, final_games=8,
    starts=[1, 9, 12], tokenizer_stop=8, updates=[1000, 100, 12], batches=[8, 32, 32], learning_rate=1e-3,
    revive_codes=100, stem_stride=16, tokenizer_blocks=0, embed_dim=64, sequence_length=10, layers=4, width=128,
    dropout=0.0, lstm_size=256, burn_in=10, horizon=10)
FREE_ON_RESUME = {"resume", "device", "mixed_precision", "parallel_games", "run_dir"}  # may change within a run
MAY_BE_ZERO = {"seed", "revive_codes", "tokenizer_blocks", "epsilon", "dropout", "gamma", "td_lambda", "entropy_coef"}
AT_MOST_ONE = {"epsilon", "dropout", "gamma", "td_lambda"}

def parse_args(argv=None):
    """Flags -> namespace. Bad values end the program with one line on stderr and exit code 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):  # argparse would print the usage, some forty lines, above the message
            self.exit(2, f"iris.py: {message} (see python iris.py --help)\n")

    parser = Parser(prog="iris.py", description="IRIS: Atari learned inside a world model.", allow_abbrev=False,
                    formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(
                        prog, max_help_position=34, width=118))
    switch, three = argparse.BooleanOptionalAction, dict(type=int, nargs=3, metavar=("TOK", "WM", "AC"))
    run = parser.add_argument_group("run")
    run.add_argument("--env", default="Pong", help="game: Pong, or ALE/Pong-v5")
    run.add_argument("--preset", default="auto", choices=("auto", "paper", "small"),
                     help="paper: all of its numbers; small: for two CPU cores; auto: paper if there is a GPU")
    run.add_argument("--exp-name", default="iris", help="goes into the run's name")
    run.add_argument("--seed", type=int, default=1, help="of networks, sampling and games")
    run.add_argument("--run-dir", default="runs", help="folder for the folders of runs")
    run.add_argument("--resume", metavar="RUN", help="go on with this run folder; its flags are taken from there")
    run.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to compute")
    run.add_argument("--mixed-precision", action=switch, help="bfloat16; default: where the hardware computes in it")
    run.add_argument("--torch-deterministic", action=switch, default=False, help="repeatable on a GPU too, but slower")
    plan = parser.add_argument_group("schedule: three numbers are for tokenizer, world model, actor-critic")
    plan.add_argument("--epochs", type=int, default=600, help="an epoch collects, then trains the three in turn")
    plan.add_argument("--collect-epochs", type=int, default=500, help="epochs that collect; 500 x 200 is Atari 100k")
    plan.add_argument("--collect-steps", type=int, default=200, help="real steps of such an epoch")
    plan.add_argument("--starts", **three, default=[6, 26, 51], help="first epochs that train them")
    plan.add_argument("--tokenizer-stop", type=int, default=600, help="last epoch that trains it; then words are fixed")
    plan.add_argument("--updates", **three, default=[200, 200, 200], help="updates of each an epoch")
    plan.add_argument("--batches", **three, default=[256, 64, 64], help="frames, segments, dreams in an update")
    plan.add_argument("--learning-rate", type=float, default=1e-4, help="of Adam, for all three")
    play = parser.add_argument_group("real play")
    play.add_argument("--epsilon", type=float, default=0.01, help="share of random actions while collecting")
    play.add_argument("--temperature", type=float, help="while collecting; default: 1, for Freeway 0.01 (appendix)")
    play.add_argument("--eval-temperature", type=float, default=0.5, help="of the policy in evaluations")
    play.add_argument("--eval-every", type=int, default=5, help="epochs between evaluations")
    play.add_argument("--eval-games", type=int, default=16, help="games of such an evaluation")
    play.add_argument("--final-games", type=int, default=100, help="games of the evaluation at the end")
    play.add_argument("--parallel-games", type=int, default=16, help="evaluation games side by side; for speed only")
    tok = parser.add_argument_group("tokenizer")
    tok.add_argument("--tokens-per-frame", type=int, choices=(16, 64), default=16, help="K; 64: finer, slower (app. E)")
    tok.add_argument("--vocab-size", type=int, default=512, help="V: codes in the codebook")
    tok.add_argument("--embed-dim", type=int, default=512, help="E: dimensions of a code")
    tok.add_argument("--tokenizer-channels", type=int, default=64, help="C, a multiple of 32")
    tok.add_argument("--tokenizer-blocks", type=int, default=2, help="residual blocks a resolution; decoder: 1 more")
    tok.add_argument("--stem-stride", type=int, choices=(1, 2, 4, 8, 16), default=1, help="above 1: cheaper, coarser")
    tok.add_argument("--perceptual-loss", choices=("auto", "lpips", "none"), default="auto",
                     help="lpips is the paper's and fetches weights once; auto: none where they cannot be had")
    tok.add_argument("--reconstruction-loss", choices=("auto", "l1", "l2"), default="auto",
                     help="l2 is the paper's text, l1 the authors' code; auto: l1 beside lpips, l2 without it")
    tok.add_argument("--revive-codes", type=int, default=0, help="updates between moves of unused codes; 0: never")
    wm = parser.add_argument_group("world model")
    wm.add_argument("--sequence-length", type=int, default=20, help="T: steps the transformer sees")
    wm.add_argument("--layers", type=int, default=10, help="transformer blocks")
    wm.add_argument("--heads", type=int, default=4, help="attention heads")
    wm.add_argument("--width", type=int, default=256, help="D, a multiple of the heads")
    wm.add_argument("--dropout", type=float, default=0.1, help="on embedding, attention and residuals")
    wm.add_argument("--reward-loss", choices=("cross-entropy", "mse"), default="cross-entropy", help="mse is the text")
    ac = parser.add_argument_group("actor-critic")
    ac.add_argument("--lstm-size", type=int, default=512, help="L: size of the policy's memory")
    ac.add_argument("--burn-in", type=int, default=20, help="real frames that fill it before a dream")
    ac.add_argument("--horizon", type=int, default=20, help="H: frames of a dream, at most T")
    ac.add_argument("--gamma", type=float, default=0.995, help="discount")
    ac.add_argument("--td-lambda", type=float, default=0.95, help="lambda of the returns: 0 one step, 1 whole dream")
    ac.add_argument("--entropy-coef", type=float, default=0.001, help="weight of the entropy bonus")

    args, config = parser.parse_args(argv), {}
    if args.resume:
        config = read_config(Path(args.resume))
        parser.set_defaults(**config)
        args = parser.parse_args(argv)  # again, with the run's own flags as defaults
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    if device not in (best, "cpu"):
        parser.error(f"--device {device}: this machine, or this build of torch, has none; auto finds the best there is")
    if args.preset == "auto":
        args.preset = "small" if device == "cpu" else "paper"
        print(dict(small="no GPU found: the small preset, half an hour on two cores (--preset paper for the paper's)",
                   paper="GPU found: the paper preset, hours (--preset small for a demonstration)")[args.preset])
    if args.preset == "small" and not args.resume:
        parser.set_defaults(**SMALL)
        args = argparse.Namespace(**vars(parser.parse_args(argv)) | dict(preset="small"))
    args.device, args.env = device, args.env if "/" in args.env else f"ALE/{args.env}-v5"
    if args.temperature is None:
        args.temperature = 0.01 if "Freeway" in args.env else 1.0
    if args.mixed_precision is None:  # only where bfloat16 is computed in hardware, and so saves time
        units, cpu = torch.cpu.get_capabilities(), device == "cpu"
        args.mixed_precision = bool(cpu and (units.get("avx512_bf16") or units.get("amx_bf16")) or
                                    device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    for name, value in vars(args).items():
        flag, zero, one = f"--{name.replace('_', '-')}", name in MAY_BE_ZERO, name in AT_MOST_ONE
        for x in value if isinstance(value, list) else [value]:
            if type(x) in (int, float) and not (0 < x < math.inf or x == 0 and zero) or one and x > 1:
                parser.error(f"{flag} {x} is out of range: {'at least' if zero else 'above'} 0{', at most 1' * one}")
        if name in config.keys() - FREE_ON_RESUME and value != config[name]:
            parser.error(f"{flag} is {config[name]} in {args.resume}, and a run goes on as it began")
    for wrong, why in ((args.horizon > args.sequence_length, "--horizon cannot exceed --sequence-length"),
                       (args.width % args.heads, "--width must be a multiple of --heads"),
                       (args.tokenizer_channels % 32, "--tokenizer-channels must be a multiple of 32"),
                       (args.stem_stride * args.tokens_per_frame > 512, "64 --tokens-per-frame: --stem-stride up to 8"),
                       (args.collect_epochs > args.epochs, "--collect-epochs cannot exceed --epochs"),
                       (args.starts != sorted(args.starts), "--starts must rise: each part needs the one before")):
        if wrong:
            parser.error(why)
    return args

def read_config(folder):
    """A run folder's config.json -> its flags. InputError if there is none that this program wrote."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a run folder: config.json is missing or damaged ({error})") from None
    if isinstance(config, dict) and SMALL.keys() <= config.keys():
        return config
    raise InputError(f"{folder}: config.json is not of this program, or of another version of it")


# ---- 2. Environment: real Atari frames, two hours of them ------------------------------------------------------------
def make_env(env_id, num_envs=1, training=True):
    """The one place to change for a game of your own: a gymnasium VectorEnv with observations (num_envs, 1, 64, 64, 3)
    uint8 RGB, discrete actions, and `terminations` as ends. InputError for an unknown game.
    """
    # ale-py's vector environment does all of it in C++, down to an area resize that keeps a one-pixel ball. Most of its
    # defaults are DQN's, hence this list. In training a lost life ends the episode without restarting the game, games
    # begin with up to 30 no-ops and last up to 20,000 raw frames; in evaluation they are whole (108,000).
    try:
        return gym.make_vec(
            env_id, num_envs=num_envs, frameskip=4, maxpool=True, img_height=64, img_width=64, grayscale=False,
            stack_num=1, repeat_action_probability=0.0, reward_clipping=False, use_fire_reset=False,
            full_action_space=False, episodic_life=False, life_loss_info=training, noop_max=30 if training else 1,
            max_num_frames_per_episode=20_000 if training else 108_000)
    except gym.error.Error as error:
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
        frames, _ = self.env.reset(seed=self.seed + number)
        self.number, self.frame, self.first, self.actions, self.score = number, frames[0, 0], True, [], 0.0

    def step(self, action):
        """-> reward, end (running out of time is none), and the game's score if it is over, else None."""
        self.actions.append(action)
        frames, rewards, terminated, truncated, info = self.env.step(np.array([action]))
        reward, self.first, score = float(rewards[0]), bool(terminated[0] or truncated[0]), None
        if self.first:  # one no-op shows whether the game goes on with the next life, or another has begun
            frames, rewards, *_, after = self.env.step(np.array([0]))
            reward += float(rewards[0])
        self.frame, self.score = frames[0, 0], self.score + reward
        if self.first and after["episode_frame_number"][0] < info["episode_frame_number"][0]:
            score = self.score
            self.begin(self.number + 1)
        return reward, bool(terminated[0]), score

    def state_dict(self):
        return dict(number=self.number, actions=self.actions)

    def load_state_dict(self, state):
        self.begin(state["number"])
        for action in state["actions"]:
            self.step(action)


# ---- 3. Replay: every real step, and what the tokenizer makes of it --------------------------------------------------
class Replay(nn.Module):
    """All real steps, in tensors on the device: 1.2 GB for 100,000. A Module only for its state_dict()."""
    # Step i is a frame, the action taken on seeing it, the reward that followed and whether this cost a life. `tokens`
    # and `reconstructions` are what the tokenizer makes of the frames. It is frozen while the other two networks train,
    # so this is computed once an epoch, where a plain loop encodes the frames of every batch again.
    def __init__(self, capacity, tokens_per_frame, dtype):
        super().__init__()
        for name, shape, kind, kept in (
                ("frames", (64, 64, 3), torch.uint8, False),  # kept by Training.save in a file of their own
                ("actions", (), torch.long, True), ("rewards", (), torch.float, True), ("ends", (), torch.long, True),
                ("starts", (), torch.long, True),  # the first step of each episode
                ("tokens", (tokens_per_frame,), torch.long, False),
                ("reconstructions", (3, 64, 64), dtype, False)):  # all that the policy ever sees of a frame
            self.register_buffer(name, torch.zeros(capacity, *shape, dtype=kind), persistent=kept)
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
        # Episodes are drawn uniformly, not steps: short ones, with their rare ends, come up more often. The running
        # episode is one of them. Then align="start" draws the first step, and pads on the right; "stop" draws the last
        # one, and pads on the left. Padding repeats the episode's edge; `valid` keeps it out of every loss.
        bounds = torch.cat([self.starts[:self.episodes], self.starts.new_tensor([self.size])])
        episode = torch.randint(self.episodes, (batch,), device=bounds.device)
        start, length = bounds[episode], bounds[episode + 1] - bounds[episode]  # (B,)
        drawn = (torch.rand(batch, device=bounds.device) * length).long().minimum(length - 1)
        first = drawn - (steps - 1 if align == "stop" else 0)
        position = first[:, None] + torch.arange(steps, device=bounds.device)  # (B, T), may stick out of the episode
        valid = (position >= 0) & (position < length[:, None])
        return start[:, None] + position.clamp(min=0).minimum(length[:, None] - 1), valid

def to_network(frames):
    """uint8 frames (..., 64, 64, 3) -> float (..., 3, 64, 64) in [-1, 1]."""
    return frames.movedim(-1, -3).float() / 127.5 - 1


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
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h w, 3 C)
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # each (B, 1, h w, C): one head
        y = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v
        return x + self.out(y[:, 0].transpose(1, 2).reshape(x.shape))

class Tokenizer(nn.Module):
    """Discrete autoencoder: frames (N, 3, 64, 64) in [-1, 1] <-> tokens (N, K), a g x g grid read row by row."""
    def __init__(self, args):
        super().__init__()
        C, E, stride = args.tokenizer_channels, args.embed_dim, args.stem_stride
        self.grid = math.isqrt(args.tokens_per_frame)
        # Resolutions, halved from level to level; the paper's are 64, 32, 16, 8, 4. Layers are named "level_block".
        sizes = [64 // stride >> i for i in range((64 // stride // self.grid).bit_length())]

        def level(side, i, depth):
            layers = {}
            for block in range(depth):
                layers[f"{side}_{i}_block_{block}"] = ResBlock(C)
                if sizes[i] in (8, 16):  # larger grids are too costly for attention, smaller ones have the middle's
                    layers[f"{side}_{i}_attn_{block}"] = SpatialAttention(C)
            return layers

        def middle():
            return dict(mid_block_1=ResBlock(C), mid_attn_1=SpatialAttention(C), mid_block_2=ResBlock(C))

        def output(n):
            return dict(norm_out=nn.GroupNorm(32, C, eps=1e-6), silu=nn.SiLU(), conv_out=nn.Conv2d(C, n, 3, padding=1))

        encoder = dict(conv_in=nn.Conv2d(3, C, stride + 2, stride, padding=1))
        decoder = dict(conv_in=nn.Conv2d(E, C, 3, padding=1)) | middle()
        for i in range(len(sizes)):  # downwards; the halving convolution is padded on the right and at the bottom only
            encoder |= level("down", i, args.tokenizer_blocks)
            if sizes[i] > self.grid:
                encoder[f"down_{i}_downsample"] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(C, C, 3, 2))
        for i in reversed(range(len(sizes))):  # and up again, one block deeper
            decoder |= level("up", i, args.tokenizer_blocks + 1)
            if i > 0:
                decoder[f"up_{i}_upsample"] = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 3, padding=1))
        # A stem of stride s sees s x s pixels at once; the decoder returns them as channels, shuffled back into place.
        decoder |= output(3 * stride ** 2) | dict(pixels=nn.PixelShuffle(stride))
        self.encoder = nn.Sequential(OrderedDict(encoder | middle() | output(E) | dict(pre_quant=nn.Conv2d(E, E, 1))))
        self.decoder = nn.Sequential(OrderedDict(dict(post_quant=nn.Conv2d(E, E, 1)) | decoder))
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

    def tokenize(self, frames):
        """Real frames (N, 64, 64, 3) uint8 -> tokens (N, K)."""
        return self.quantize(self.encoder(to_network(frames)))

    def draw(self, tokens):
        """Tokens (N, K) -> frames (N, 3, 64, 64), clamped to [-1, 1], as the policy sees them."""
        return self.decoder(self.embed(tokens)).clamp(-1, 1)

    def loss(self, x, perceptual, reconstruction_loss):
        """Equation 1 on frames x (N, 3, 64, 64) in [-1, 1] -> loss, metrics, latents z. perceptual: LPIPS or None."""
        # L = |x - D(z_q)| + |sg(z) - z_q|^2 + |z - sg(z_q)|^2 + LPIPS(x, D(z_q)); sg stops the gradient.
        z = self.encoder(x)  # (N, E, g, g)
        z_q = self.embed(self.quantize(z))
        # Straight through: the value is z_q, while the gradient passes to z as if nothing had been rounded.
        x_hat = self.decoder(z + (z_q - z).detach())
        codebook, commitment = F.mse_loss(z_q, z.detach()), F.mse_loss(z, z_q.detach())
        d = (x - x_hat).float()
        reconstruction = d.abs().mean() if reconstruction_loss == "l1" else d.square().mean()
        detail = d.new_zeros(()) if perceptual is None else perceptual(x, x_hat).mean()
        loss = reconstruction + codebook + commitment + detail
        metrics = dict(tokenizer_loss=loss, reconstruction_loss=reconstruction, codebook_loss=codebook,
                       commitment_loss=commitment, perceptual_loss=detail)
        return loss, {name: value.detach() for name, value in metrics.items()}, z

class LPIPS(nn.Module):
    """Perceptual distance: how differently a trained VGG16 sees two images (Zhang et al. 2018). Never trained here."""
    LAYERS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width, depth in zip(self.WIDTHS, (2, 2, 3, 3, 3)):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)  # numbered as in torchvision, so that its weights fit
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in self.WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    def forward(self, x, y):
        """Images (N, 3, h, w) in [-1, 1] -> distances (N,)."""
        distance, h = 0, (torch.cat([x, y]) - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.LAYERS:
                a, b = (h.float() / (h.float().square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                distance = distance + self.heads[self.LAYERS.index(i)]((a - b).square()).mean((1, 2, 3))
        return distance

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"

def load_lpips():
    """LPIPS with its published weights, from torch hub's cache or fetched into it. InputError if they cannot be had."""
    fetch = torch.hub.load_state_dict_from_url  # check_hash: the hash in a file's name is the start of its sha256
    options, heads_name = dict(check_hash=True, map_location="cpu", weights_only=True), "lpips_vgg-a78928a0.pth"
    try:
        vgg, heads = fetch(VGG_URL, **options), fetch(HEADS_URL, file_name=heads_name, **options)
        weights = {name: value for name, value in vgg.items() if name.startswith("features.")}
        weights |= {f"heads.{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(5)}
        lpips = LPIPS()
        lpips.load_state_dict(weights)
    except Exception as error:  # no network, a wrong hash, a damaged file, a tensor missing: it cannot be had
        raise InputError(f"LPIPS weights cannot be had ({str(error).splitlines()[0]}); put {VGG_URL} and {HEADS_URL} "
                         f"(as {heads_name}) into {torch.hub.get_dir()}/checkpoints") from None
    return lpips


# ---- 5. World model: Atari as a language (a GPT; section 2.2, appendix A.2) ------------------------------------------
# The text that it reads: each step's K = 16 frame tokens z and its action a; and what each position predicts:
#
#   position     0    1  ...   14   15     16  |  17   18  ...   31   32     33  |  34
#   input       z00  z01 ...  z0e  z0f     a0  |  z10  z11 ...  z1e  z1f     a1  |  z20 ...
#   next token  z01  z02 ...  z0f    -    z10  |  z11  z12 ...  z1f    -    z20  |  z21 ...
#   reward, end                         r0, e0 |                          r1, e1 |
#
# z0f predicts no token: an action follows it, which is the policy's to choose. A token sees everything to its left.
class Block(nn.Module):
    """Pre-norm transformer block: (B, S, D) -> the same."""
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, cache=None, start=0):
        # Without a cache x is the whole sequence. With one, x are the positions start .. start + S - 1, and the cache
        # (2, B, nh, S_max, hs) holds the keys and values of all before them; those of x are written into it.
        B, S, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, nh, S, hs)
        if cache is not None:
            cache[0, :, :, start:start + S], cache[1, :, :, start:start + S] = k, v
            k, v = cache[:, :, :, :start + S]  # each (B, nh, start + S, hs)
        # New position i sees the columns 0 .. start + i. A single new one sees all there are: no mask.
        mask = x.new_ones(S, start + S, dtype=torch.bool).tril(start) if start > 0 and S > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=start == 0,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = self.proj(y.transpose(1, 2).reshape(B, S, D))
        x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)

class WorldModel(nn.Module):
    """GPT over frame tokens and actions, with heads for the next frame token, the reward and the end."""
    def __init__(self, args, num_actions):
        super().__init__()
        D, K, V = args.width, args.tokens_per_frame, args.vocab_size
        self.tokens_per_frame, self.reward_loss = K, args.reward_loss
        self.token_embedding, self.action_embedding = nn.Embedding(V, D), nn.Embedding(num_actions, D)
        self.position_embedding = nn.Embedding(args.sequence_length * (K + 1), D)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(D, args.heads, args.dropout) for _ in range(args.layers))
        self.norm = nn.LayerNorm(D)
        rewards = 3 if args.reward_loss == "cross-entropy" else 1  # classes are the signs -1, 0, 1
        self.head_token, self.head_reward, self.head_end = (
            nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, n)) for n in (V, rewards, 2))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def embed(self, tokens, actions):
        """Tokens (B, T, K), actions (B, T) -> (B, S, D): every step's frame tokens, then its action."""
        return torch.cat([self.token_embedding(tokens), self.action_embedding(actions)[:, :, None]], 2).flatten(1, 2)

    def forward(self, x, caches=None, start=0):
        """Embedded positions start .. start + S - 1 (B, S, D) -> hidden states (B, S, D). Block explains caches."""
        x = self.dropout(x + self.position_embedding.weight[start:start + x.shape[1]])
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], start)
        return self.norm(x)

    def predict(self, tokens, actions):
        """Tokens (B, T, K), actions (B, T) -> logits of next tokens (B, T K, V), rewards (B, T, 3), ends (B, T, 2)."""
        K = self.tokens_per_frame
        h = self(self.embed(tokens, actions)).unflatten(1, (-1, K + 1))  # (B, T, K + 1, D)
        speaking = torch.cat([h[:, :, :K - 1], h[:, :, K:]], dim=2)  # all but the frame's last token, see above
        return self.head_token(speaking).flatten(1, 2), self.head_reward(h[:, :, K]), self.head_end(h[:, :, K])

    def loss(self, tokens, actions, rewards, ends, valid):
        """Segments (B, T, ...), valid (B, T) -> the sum of three cross-entropies, means over the valid; metrics."""
        token_logits, reward_logits, end_logits = (logits.float() for logits in self.predict(tokens, actions))
        # The i-th prediction is about the i+1-th frame token of the segment. The very first token is given; the last
        # action predicts a frame that is not in the segment. Targets of -100 are skipped by cross_entropy.
        targets = tokens.masked_fill(~valid[..., None], -100).flatten(1)[:, 1:]  # (B, T K - 1)
        token_loss = F.cross_entropy(token_logits[:, :-1].flatten(0, 1), targets.flatten())
        signs = rewards.sign()
        if self.reward_loss == "cross-entropy":
            classes = (signs.long() + 1).masked_fill(~valid, -100)
            reward_loss = F.cross_entropy(reward_logits.flatten(0, 1), classes.flatten())
        else:
            reward_loss = ((reward_logits[..., 0] - signs).square() * valid).sum() / valid.sum()
        end_loss = F.cross_entropy(end_logits.flatten(0, 1), ends.masked_fill(~valid, -100).flatten())
        metrics = dict(token_loss=token_loss, reward_loss=reward_loss, end_loss=end_loss)
        return token_loss + reward_loss + end_loss, {name: value.detach() for name, value in metrics.items()}

def sample(logits, u, temperature=1.0):
    """Logits (..., n), uniform numbers u (...) in [0, 1) -> classes (...), by inverting the cumulative distribution."""
    # One given number a draw: whatever samples is a plain function of its inputs, so a dream can be repeated, compared
    # with a slower implementation, and recorded as a CUDA graph.
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    return (cumulative <= u[..., None] * cumulative[..., -1:]).sum(-1)  # the last sum is 1 only up to rounding


# ---- 6. Actor-critic: learns in dreams, plays for real (section 2.3, appendices A.3 and B) ---------------------------
class ActorCritic(nn.Module):
    """CNN and LSTM with a policy and a value head. Its memory, `state`, is a pair (h, c) of (B, L)."""
    def __init__(self, args, num_actions):
        super().__init__()
        layers, channels = [], 3
        for width in (32, 32, 64, 64):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            channels = width
        self.cnn = nn.Sequential(*layers, nn.Flatten())  # (N, 3, 64, 64) -> (N, 64 * 4 * 4)
        self.lstm = nn.LSTMCell(64 * 4 * 4, args.lstm_size)
        self.actor, self.critic = nn.Linear(args.lstm_size, num_actions), nn.Linear(args.lstm_size, 1)

    def initial_state(self, batch):
        """An empty memory."""
        return (self.actor.weight.new_zeros(batch, self.lstm.hidden_size),) * 2

    def forward(self, frames, state, valid=None):
        """Drawn frames (B, T, 3, 64, 64), memory before them -> logits (B, T, A), values (B, T), memory after them."""
        # valid (B, T) is false on the left where there is padding, which leaves the memory empty.
        features, h = self.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]), []  # (B, T, 1024)
        for t in range(frames.shape[1]):
            state = self.lstm(features[:, t], state)
            state = state if valid is None else tuple(part * valid[:, t, None] for part in state)
            h.append(state[0])
        h = torch.stack(h, dim=1)  # (B, T, L)
        return self.actor(h), self.critic(h)[..., 0], state

    def loss(self, imagined, state, args):
        """A dream (see `dream`) and the memory at its start -> loss, metrics; appendix B."""
        # The dream was played without gradient; this one pass over its frames has it, and finds the same numbers.
        logits, values, _ = self(imagined["frames"], state)  # (B, H, A), (B, H)
        logits, values, ends = logits[:, :-1].float(), values.float(), imagined["ends"]  # the last value bootstraps
        returns = lambda_returns(imagined["rewards"], values.detach(), ends, args.gamma, args.td_lambda)  # (B, H - 1)
        # What is dreamt after an end is worth nothing: it takes no part in any of the three losses.
        alive = (ends.cumsum(1) - ends == 0).float()
        weight = alive / alive.sum()
        log_policy = logits.log_softmax(-1)  # (B, H - 1, A)
        log_chosen = log_policy.gather(-1, imagined["actions"][..., None])[..., 0]
        advantage = returns - values[:, :-1]
        policy_loss = -(weight * log_chosen * advantage.detach()).sum()  # REINFORCE with the value as baseline
        value_loss = (weight * advantage.square()).sum()
        entropy = -(weight[..., None] * log_policy.exp() * log_policy).sum()
        loss = policy_loss + value_loss - args.entropy_coef * entropy
        variance = (weight * (returns - (weight * returns).sum()).square()).sum()
        metrics = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy,
                       explained_variance=1 - value_loss / (variance + 1e-8),
                       dream_return=(imagined["rewards"] * alive).sum(1).mean())
        return loss, {name: value.detach() for name, value in metrics.items()}

def lambda_returns(rewards, values, ends, gamma, lambda_):
    """Appendix B: rewards and ends (B, H - 1), values (B, H) -> returns (B, H - 1)."""
    # G_t = r_t + gamma (1 - end_t) ((1 - lambda) V_{t+1} + lambda G_{t+1}), from the back; G_{H-1} = V_{H-1}.
    assert rewards.shape == ends.shape == values[:, 1:].shape
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
        seen = self.tokenizer.draw(self.tokenizer.tokenize(frames))  # the policy knows no other frames
        logits, _, state = self.actor_critic(seen[:, None], (h, c))
        return sample(logits[:, 0], u, temperature), state

@torch.no_grad()  # the policy must not reshape its own dream
def dream(agent, tokens, past_actions, frame, state, u, actions=None):
    """Plays inside the world model -> dict of frames (B, H, 3, 64, 64), tokens (B, H, K), actions, rewards and ends
    (B, H - 1), and the policy's last state.

    tokens (B, n, K): real frames, the last of which the dream starts from (training: n = 1); past_actions (B, n - 1):
    those between them; frame: the last one, drawn; state: the policy's memory; actions (B, H - 1): if given, taken
    instead of the policy's; u (B, H - 1, K + 3): uniform numbers, a step's being for action, reward, end and K tokens.
    """
    # Keys and values of the past are cached, so that a new position costs one position. A frame's last token predicts
    # nothing and waits for the action; the two go in together, hence K passes for the K + 1 positions of a step.
    world_model, K = agent.world_model, agent.world_model.tokens_per_frame
    embedded = world_model.token_embedding(tokens[:, -1])  # (B, K, D)
    prefix, last = torch.cat([world_model.embed(tokens[:, :-1], past_actions), embedded[:, :-1]], 1), embedded[:, -1]
    (positions, D), block = world_model.position_embedding.weight.shape, world_model.blocks[0]
    caches = block.qkv(last).new_zeros(  # made like keys: in their precision
        len(world_model.blocks), 2, len(tokens), block.heads, positions, D // block.heads)
    world_model(prefix, caches)
    dreamt = dict(frames=[frame], tokens=[tokens[:, -1]], actions=[], rewards=[], ends=[])
    for t in range(u.shape[1]):
        position = prefix.shape[1] + t * (K + 1)
        logits, _, state = agent.actor_critic(frame[:, None], state)
        action = sample(logits[:, 0], u[:, t, 0]) if actions is None else actions[:, t]
        pair = torch.stack([last, world_model.action_embedding(action)], dim=1)  # (B, 2, D)
        h = world_model(pair, caches, position)[:, -1]  # (B, D), at the action
        dreamt["actions"].append(action)
        reward = world_model.head_reward(h).float()  # (B, 3) logits of the signs, or (B, 1) with mse
        dreamt["rewards"].append(sample(reward, u[:, t, 1]).float() - 1 if reward.shape[1] == 3 else reward[:, 0])
        dreamt["ends"].append(sample(world_model.head_end(h), u[:, t, 2]).float())
        words = []
        for k in range(K):
            words.append(sample(world_model.head_token(h), u[:, t, 3 + k]))  # (B,)
            last = world_model.token_embedding(words[-1])
            if k < K - 1:
                h = world_model(last[:, None], caches, position + 2 + k)[:, 0]
        dreamt["tokens"].append(torch.stack(words, dim=1))
        frame = agent.tokenizer.draw(dreamt["tokens"][-1])
        dreamt["frames"].append(frame)
    return {name: torch.stack(steps, dim=1) for name, steps in dreamt.items()} | dict(state=state)


# ---- 8. The authors' checkpoints -------------------------------------------------------------------------------------
OFFICIAL_NAMES = (  # (pattern in our tensor names, what the authors' names have there), applied one after another
    (r"coder\.(down|up)_(\d)_(block|attn)_(\d)", r"coder.\1.\2.\3.\4"), (r"coder\.(down|up)_(\d)_", r"coder.\1.\2."),
    (r"coder\.mid_", "coder.mid."), (r"sample\.1", "sample.conv"), (r"..coder\.(p\w+)_quant", r"\1_quant_conv"),
    (r"tokenizer\.codebook", "tokenizer.embedding"), (r"(tokenizer.*)\.out\.", r"\1.proj_out."),
    (r"world_model\.(blocks|norm)", r"world_model.transformer.\1"), (r"transformer\.norm", "transformer.ln_f"),
    (r"(blocks\.\d+)\.norm", r"\1.ln"), (r"(blocks\.\d+)\.(proj|qkv)", r"\1.attn.\2"),
    ("action_embedding", "embedder.embedding_tables.0"), ("token_embedding", "embedder.embedding_tables.1"),
    ("position_embedding", "pos_emb"), (r"cnn\.(\d+)", lambda match: f"conv{int(match[1]) // 3 + 1}"),
    ("head_token", "head_observations.head_module"), (r"head_(reward|end)\.", r"head_\1s.head_module."),
    (r"\.(actor|critic)\.", r".\1_linear."))

def load_official(agent, state_dict, lpips=None):
    """Puts one of the authors' agents (<Game>.pt) into ours, its LPIPS into `lpips`. InputError if it does not fit."""
    def fetch(name):  # the tensor that we call so; our fused qkv is three of theirs
        for pattern, theirs in OFFICIAL_NAMES:
            name = re.sub(pattern, theirs, name)
        parts = ("query", "key", "value") if "transformer" in name else ("q", "k", "v")
        return torch.cat([state_dict[name.replace("qkv", part)] for part in (parts if "qkv" in name else parts[:1])])

    try:
        agent.load_state_dict({name: fetch(name) for name in agent.state_dict()})
        if lpips is not None:
            vgg = {f"features.{name.split('.', 4)[4]}": x for name, x in state_dict.items() if ".lpips.net." in name}
            heads = {f"heads.{i}.weight": state_dict[f"tokenizer.lpips.lin{i}.model.1.weight"] for i in range(5)}
            lpips.load_state_dict(vgg | heads)
    except KeyError as error:
        raise InputError(f"not one of the authors' checkpoints: it has no tensor {error}") from None
    except RuntimeError as error:  # a headline and then every tensor that does not fit; the first will do
        reason = (str(error).split("\n\t") + [""])[1]
        raise InputError(f"the checkpoint does not fit these flags or the game's actions: {reason}") from None


# ---- 9. Evaluation and pictures --------------------------------------------------------------------------------------
class CudaGraph:
    """Records the kernels that a function launches, then replays them in one go: the same arithmetic, no Python."""
    # A dream is tens of thousands of tiny kernels, each quicker to run than to launch. Shapes must stay those of the
    # first call, whose inputs become the place where later inputs are copied to; every call overwrites the outputs.
    def __init__(self, function):
        self.function, self.graph = function, None

    def __call__(self, *inputs):
        if self.graph is None:
            self.inputs, side = [x.clone() for x in inputs], torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up on first use, which cannot be recorded
                self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        for place, given in zip(self.inputs, inputs):
            place.copy_(given)
        self.graph.replay()
        return self.outputs

def fast(function, args):
    """A function of tensors of fixed shapes, in mixed precision, without gradient and, on a GPU, as a CUDA graph."""
    def run(*inputs):
        # Autocast inside: its casts of the weights must be part of the graph, since the weights will change.
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.mixed_precision):
            return function(*inputs)
    return CudaGraph(run) if args.device == "cuda" else run

def evaluate(agent, args, games, record=400):
    """Plays whole real games, dreaming of nothing -> returns (games,), and up to `record` steps of the first game."""
    # Every game has its own seed for the emulator and its own stream of random numbers for the policy, and every game
    # counts. So the result depends neither on how many are played side by side nor on which of them end first.
    device, seed, returns, recording = torch.device(args.device), args.seed * 100_000 + 50_000, [], []
    for first in range(0, games, args.parallel_games):
        numbers = range(first, min(first + args.parallel_games, games))
        env = make_env(args.env, len(numbers), training=False)
        act = fast(partial(agent.act, temperature=args.eval_temperature), args)
        streams = [np.random.default_rng([args.seed, number]) for number in numbers]
        frames, _ = env.reset(seed=seed + np.array(numbers))
        state = agent.actor_critic.initial_state(len(numbers))
        scores, playing = np.zeros(len(numbers)), np.ones(len(numbers), bool)
        while playing.any():
            u = torch.tensor([stream.random() for stream in streams], dtype=torch.float32, device=device)
            actions, state = act(torch.from_numpy(frames[:, 0]).to(device), u, *state)
            taken, before = actions.cpu().numpy(), frames
            frames, rewards, terminated, truncated, _ = env.step(taken)
            scores += rewards * playing  # a game that is over waits for the others; what its slot does is ignored
            if first == 0 and playing[0] and len(recording) < record:
                recording.append((before[0, 0], taken[0], rewards[0], terminated[0]))
            playing = playing & ~(terminated | truncated)
        env.close()
        returns.extend(scores)
    columns = (torch.from_numpy(np.stack(column)).to(device) for column in zip(*recording))
    return np.array(returns), dict(zip(("frames", "actions", "rewards", "ends"), columns))

@torch.no_grad()
def held_out_metrics(agent, recording, T):
    """The networks on real play that they were not trained on, cut into segments of T steps -> metrics."""
    # The world model must beat "each token stays what it was a frame ago". As a forecast with probabilities, copying
    # gets the benefit of hindsight: its own accuracy on the copied token, the rest spread evenly over the others.
    count = len(recording["frames"]) // T
    frames, V = recording["frames"][:count * T], agent.world_model.token_embedding.num_embeddings
    tokens = torch.cat([agent.tokenizer.tokenize(part) for part in frames.split(64)])  # (count T, K)
    error = torch.cat([agent.tokenizer.draw(part) for part in tokens.split(64)]) - to_network(frames)
    tokens, actions = tokens.unflatten(0, (count, T)), recording["actions"][:count * T].view(count, T)
    logits = torch.cat([agent.world_model.predict(*part)[0] for part in zip(tokens.split(8), actions.split(8))])
    logits = logits[:, tokens.shape[-1] - 1:-1].float()  # those about the frames 1 .. T - 1: (count, (T - 1) K, V)
    targets, copies = tokens[:, 1:].flatten(), tokens[:, :-1].flatten()
    copied = (copies == targets).float().mean().clamp(1e-3, 1 - 1e-3)
    metrics = dict(
        heldout_psnr=-10 * (error / 2).square().mean().log10(), heldout_l1=(error / 2).abs().mean(),
        token_cross_entropy=F.cross_entropy(logits.flatten(0, 1), targets), uniform_cross_entropy=math.log(V),
        copy_cross_entropy=-copied * copied.log() - (1 - copied) * ((1 - copied) / (V - 1)).log(),
        token_accuracy=(logits.argmax(-1).flatten() == targets).float().mean(), copy_accuracy=copied)
    return {name: float(value) for name, value in metrics.items()}

def to_pixels(frames):
    """Frames (..., 3, 64, 64) in [-1, 1] -> (..., 64, 64, 3) uint8 in numpy."""
    return ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()

def draw_rows(path, rows, scale=3):
    """Writes [(label, frames (n, 64, 64, 3) uint8)] as a PNG: a labelled row each, pixels enlarged as they are."""
    lines = []
    for label, frames in rows:
        strip = np.concatenate(list(frames), axis=1).repeat(scale, 0).repeat(scale, 1)
        margin = np.full((len(strip), 130, 3), 24, np.uint8)
        cv2.putText(margin, label, (6, len(strip) // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (235,) * 3, 1, cv2.LINE_AA)
        lines += [np.concatenate([margin, strip], axis=1), np.full((4, 130 + strip.shape[1], 3), 24, np.uint8)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, cv2.imencode(".png", cv2.cvtColor(np.concatenate(lines), cv2.COLOR_RGB2BGR))[1])

@torch.no_grad()
def write_pictures(agent, args, recording, folder):
    """reconstructions.png: real frames, the tokenizer's version, the difference. dream.png: what really followed a
    frame, and what the world model dreams from that frame alone, given the same actions."""
    frames, H = recording["frames"], args.horizon
    some = frames[torch.linspace(0, len(frames) - 1, 10).long()]
    real, drawn = some.cpu().numpy(), to_pixels(agent.tokenizer.draw(agent.tokenizer.tokenize(some)))
    difference = np.abs(real.astype(int) - drawn).astype(np.uint8)
    draw_rows(folder / "reconstructions.png", [("real", real), ("reconstructed", drawn), ("difference", difference)])
    first = (len(frames) - H) // 2
    tokens, actions = agent.tokenizer.tokenize(frames[first:first + 1]), recording["actions"][first:first + H - 1]
    u = torch.rand(1, H - 1, args.tokens_per_frame + 3, generator=torch.Generator().manual_seed(args.seed))
    imagined = dream(agent, tokens[None], tokens[:, :0], agent.tokenizer.draw(tokens),
                     agent.actor_critic.initial_state(1), u.to(tokens.device), actions[None])
    draw_rows(folder / "dream.png", [("real", frames[first:first + H].cpu().numpy()),
                                     ("dreamt", to_pixels(imagined["frames"][0]))])


# ---- 10. Training: collect, then train the three parts, six hundred times --------------------------------------------
FRAME_BYTES = 64 * 64 * 3

def write_atomically(path, data):
    """All of the bytes or none: no reader, and no power cut, ever meets half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

class Training:
    """All that a run consists of. The phases of an epoch are methods that return metrics; train() is the schedule."""
    def __init__(self, args, folder):
        self.args, self.folder, self.device = args, folder, torch.device(args.device)
        torch.manual_seed(args.seed)
        self.game = Game(args.env, args.seed * 100_000)
        self.agent = Agent(args, self.game.num_actions).eval()
        self.agent.to(self.device, memory_format=torch.channels_last)  # doubles the policy's CNN's speed on a CPU too
        self.perceptual = load_lpips().to(self.device) if args.perceptual_loss == "lpips" else None
        self.amp = torch.autocast(args.device, torch.bfloat16, enabled=args.mixed_precision)
        self.replay = Replay(args.collect_epochs * args.collect_steps, args.tokens_per_frame,
                             torch.bfloat16 if args.mixed_precision else torch.float32).to(self.device)
        # Weight decay pulls on the transformer's matrices only: not on embeddings, biases and normalisation gains.
        world_model = self.agent.world_model
        decayed = {id(module.weight) for module in world_model.modules() if isinstance(module, nn.Linear)}
        groups = [dict(params=[p for p in world_model.parameters() if (id(p) in decayed) == decay],
                       weight_decay=0.01 * decay) for decay in (True, False)]
        self.optimizers = dict(
            tokenizer=torch.optim.Adam(self.agent.tokenizer.parameters(), args.learning_rate, fused=True),
            world_model=torch.optim.AdamW(groups, args.learning_rate, fused=True),
            actor_critic=torch.optim.Adam(self.agent.actor_critic.parameters(), args.learning_rate, fused=True))
        self.act = fast(partial(self.agent.act, temperature=args.temperature), args)
        self.imagine = fast(self.imagine, args)
        self.epoch, self.history, self.frames_saved = 0, [], 0

    def collect(self):
        """Section 2: real steps. The policy's memory starts from the last frames of the running episode."""
        args, replay, game, scores = self.args, self.replay, self.game, []
        empty = state = self.agent.actor_critic.initial_state(1)
        begun = replay.size if game.first else int(replay.starts[replay.episodes - 1])
        for frame in replay.frames[max(begun, replay.size - args.burn_in):replay.size]:
            _, state = self.act(frame[None], torch.zeros(1, device=self.device), *state)
        for _ in range(args.collect_steps):
            frame, first = game.frame, game.first
            luck, which, u = torch.rand(3)
            action, state = self.act(torch.from_numpy(frame)[None].to(self.device), u[None].to(self.device),
                                     *(empty if first else state))
            action = int(which * game.num_actions) if luck < args.epsilon else int(action)
            reward, end, score = game.step(action)
            replay.add(frame, action, reward, end, first)
            scores += [] if score is None else [score]
        return dict(train_return=float(np.mean(scores))) if scores else {}

    def optimize(self, part, update):
        """An epoch's updates of one network; update(i) -> loss, metrics. Returns the means of the metrics."""
        network, optimizer, history = getattr(self.agent, part), self.optimizers[part], []
        for i in self.progress(range(self.args.updates[list(self.optimizers).index(part)]), part):
            with self.amp:
                loss, metrics = update(i)
            optimizer.zero_grad()
            loss.backward()
            metrics[f"{part}_grad_norm"] = nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()  # of this network only: the policy must not reshape the world that it dreams
            history.append(metrics)
        # Only here does Python wait for the GPU; until now it was free to run ahead and keep it busy.
        return {name: float(torch.stack([metrics[name] for metrics in history]).mean()) for name in history[0]}

    def train_tokenizer(self):
        """Equation 1 on single frames; with --revive-codes, codes that nothing uses move to where latents are."""
        args, tokenizer, codes = self.args, self.agent.tokenizer, self.agent.tokenizer.codebook.weight
        uses = torch.zeros(len(codes), dtype=torch.long, device=self.device)

        def update(i):
            index, _ = self.replay.sample(args.batches[0], 1, "start")
            x = to_network(self.replay.frames[index[:, 0]])
            loss, metrics, z = tokenizer.loss(x, self.perceptual, args.reconstruction_loss)
            if args.revive_codes:
                tokens = tokenizer.quantize(z.detach())
                uses.add_(tokens.flatten().bincount(minlength=len(codes)))
                if (i + 1) % args.revive_codes == 0:  # preferring latents that are far from every code
                    latents = z.detach().float().flatten(2).transpose(1, 2).flatten(0, 1)  # (N K, E)
                    distance = (latents - codes[tokens.flatten()].detach()).square().sum(1)
                    weight = distance.nan_to_num(0, 1, 0).clamp(1e-12, 1e30)  # if it diverges, the loss shall say so
                    picked = latents[torch.multinomial(weight, len(codes), replacement=True)]
                    codes.data.copy_(torch.where(uses[:, None] == 0, picked, codes.data))
                    uses.zero_()
            return loss, metrics
        return self.optimize("tokenizer", update)

    @torch.no_grad()
    def tokenize_replay(self):
        """What the next two phases need of the tokenizer, once for every frame: it does not change under them."""
        replay, tokenizer, dreaming = self.replay, self.agent.tokenizer, self.epoch >= self.args.starts[2]
        for start in self.progress(range(0, replay.size, 256), "tokens"):
            part = slice(start, min(start + 256, replay.size))
            with self.amp:
                replay.tokens[part] = tokenizer.tokenize(replay.frames[part])
                if dreaming:
                    replay.reconstructions[part] = tokenizer.draw(replay.tokens[part])
        return dict(codes_in_use=len(replay.tokens[:replay.size].unique()))

    def train_world_model(self):
        """Segments of T real steps, as tokens."""
        replay, args = self.replay, self.args

        def update(_):
            index, valid = replay.sample(args.batches[1], args.sequence_length, "start")
            return self.agent.world_model.loss(replay.tokens[index], replay.actions[index], replay.rewards[index],
                                               replay.ends[index], valid)
        self.agent.world_model.train()
        metrics = self.optimize("world_model", update)
        self.agent.world_model.eval()  # no dropout in dreams
        return metrics

    def train_actor_critic(self):
        """Dreams that start from real frames, and the policy gradient on what was dreamt."""
        args = self.args

        def update(_):
            index, valid = self.replay.sample(args.batches[2], args.burn_in + 1, "stop")
            u = torch.rand(args.batches[2], args.horizon - 1, args.tokens_per_frame + 3, device=self.device)
            state, imagined = self.imagine(index, valid, u)
            return self.agent.actor_critic.loss(imagined, state, args)
        return self.optimize("actor_critic", update)

    def imagine(self, index, valid, u):
        """Segments of burn_in + 1 real frames, uniform numbers -> the policy's memory, the dream that follows them."""
        seen, empty = self.replay.reconstructions[index], self.agent.actor_critic.initial_state(len(index))
        *_, state = self.agent.actor_critic(seen[:, :-1], empty, valid[:, :-1])
        return state, dream(self.agent, self.replay.tokens[index[:, -1:]], index[:, :0], seen[:, -1], state, u)

    def evaluate(self, games):
        """Real games with the policy as it is, and all networks on a game that they never trained on."""
        returns, recording = evaluate(self.agent, self.args, games)
        with self.amp:
            metrics = held_out_metrics(self.agent, recording, self.args.sequence_length)
            write_pictures(self.agent, self.args, recording, self.folder / "media" / f"epoch_{self.epoch:03d}")
        return returns, dict(eval_return=float(returns.mean()), eval_std=float(returns.std()), **metrics)

    def progress(self, work, label):
        """Iterates over `work`, keeping a line on the terminal with what is done and how long the rest will take."""
        live, begun, shown = sys.stderr.isatty(), time.time(), time.time()
        for done, item in enumerate(work, start=1):
            yield item
            if time.time() - shown > (0.5 if live else 60):
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # rarely enough to cost nothing; without it the line would run ahead
                shown = time.time()
                left = (shown - begun) / done * (len(work) - done)
                print(f"{chr(13) * live}epoch {self.epoch}: {label} {done}/{len(work)}, {left:.0f} s left".ljust(70),
                      end="" if live else "\n", file=sys.stderr, flush=True)
        print(f"\r{'':70}\r" * live, end="", file=sys.stderr, flush=True)

    def save(self):
        """The state after a whole epoch."""
        # Frames are appended to a file of their own, so an epoch adds 2.5 MB of them instead of rewriting 1.2 GB. They
        # go behind those that count, not behind the file's end: a killed epoch may have left some that never did.
        path = self.folder / "frames.bin"
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.seek(self.frames_saved * FRAME_BYTES)
            file.write(self.replay.frames[self.frames_saved:self.replay.size].cpu().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.frames_saved, buffer = self.replay.size, io.BytesIO()
        torch.save(dict(
            args=vars(self.args), epoch=self.epoch, history=self.history, agent=self.agent.state_dict(),
            optimizers={part: optimizer.state_dict() for part, optimizer in self.optimizers.items()},
            replay=self.replay.state_dict(), size=self.replay.size, episodes=self.replay.episodes,
            game=self.game.state_dict(), rng=torch.get_rng_state(), gpu_rng=torch.cuda.get_rng_state_all()), buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer())
        self.write_metrics()

    def write_metrics(self):
        """metrics.csv, a row an epoch, from the history that the checkpoint holds."""
        columns = list(dict.fromkeys(name for row in self.history for name in row))
        lines = [",".join(columns)] + [",".join(str(row.get(name, "")) for name in columns) for row in self.history]
        write_atomically(self.folder / "metrics.csv", ("\n".join(lines) + "\n").encode())

    def load(self):
        """Continues from checkpoint.pt, if the run got as far as writing one."""
        path, frames = self.folder / "checkpoint.pt", self.folder / "frames.bin"
        if not path.exists():
            return
        state = read_checkpoint(path, self.device)
        if any(state["args"].get(name) != vars(self.args)[name] for name in vars(self.args).keys() - FREE_ON_RESUME):
            raise InputError(f"{path} was written with other flags than those of config.json")
        size = self.frames_saved = self.replay.size = state["size"]
        pixels, self.replay.episodes = np.fromfile(frames, np.uint8, size * FRAME_BYTES), state["episodes"]
        if pixels.size < size * FRAME_BYTES:
            raise InputError(f"{frames} is too short for the {size} steps of the checkpoint: it is damaged")
        self.replay.frames[:size] = torch.from_numpy(pixels.reshape(size, 64, 64, 3))
        for part, module in (("replay", self.replay), ("game", self.game), ("agent", self.agent)):
            module.load_state_dict(state[part])
        for part, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][part])
        self.epoch, self.history = state["epoch"], state["history"]
        torch.set_rng_state(state["rng"].cpu())
        self.write_metrics()  # a kill may have come between the checkpoint and them
        if len(state["gpu_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["gpu_rng"]])

def read_checkpoint(path, device):
    """checkpoint.pt -> its contents, without running code from it; InputError if it is missing or not whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # compares checksums; torch.load itself would take damaged weights
                raise ValueError("checksums differ")
        state = torch.load(path, map_location=device, weights_only=True)
        return state if "args" in state else state["args"]  # a KeyError: some other file of torch's
    except Exception as error:  # zipfile, pickle and torch have their own errors for a damaged file
        raise InputError(f"{path} is missing or damaged ({type(error).__name__}): nothing to go on from") from None

def train(args, folder):
    """The whole run: the phases of every epoch in order, a checkpoint after each epoch, the final evaluation."""
    run = Training(args, folder)
    run.load()
    board = SummaryWriter(folder) if SummaryWriter else None
    parts = ", ".join(f"{part} {sum(p.numel() for p in net.parameters()):,}"
                      for part, net in run.agent.named_children())
    print(f"{folder}: {args.env} on {args.device} in {'bfloat16' if args.mixed_precision else 'float32'}, preset "
          f"{args.preset}, {args.collect_epochs * args.collect_steps:,} real steps; parameters: {parts}", flush=True)
    while run.epoch < args.epochs:
        run.epoch += 1
        tokenizing, modelling, dreaming = (run.epoch >= start for start in args.starts)
        tokenizing = tokenizing and run.epoch <= args.tokenizer_stop
        row, begun = dict(epoch=run.epoch), time.time()
        for phase, due in ((run.collect, run.epoch <= args.collect_epochs), (run.train_tokenizer, tokenizing),
                           (run.tokenize_replay, modelling), (run.train_world_model, modelling),
                           (run.train_actor_critic, dreaming)):
            if due:
                started = time.time()
                row.update(phase())
                row[f"seconds_{phase.__name__}"] = time.time() - started
        if run.epoch % args.eval_every == 0:
            row.update(run.evaluate(args.eval_games)[1])
        peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        row.update(real_steps=run.replay.size, seconds=time.time() - begun, memory_gb=peak / 1e9)
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"{broken[0]} is not finite in epoch {run.epoch}; {folder} keeps the epoch before")
        run.history.append(row)
        run.save()
        shown = [f"{name.replace('_', ' ')} {row[name]:.3g}" for name in (
            "tokenizer_loss", "token_loss", "entropy", "dream_return", "train_return", "eval_return") if name in row]
        left = f"{(args.epochs - run.epoch) * row['seconds'] / 60:.0f} min left at this pace"
        print(f"epoch {run.epoch}/{args.epochs}: {row['seconds']:.0f} s, {', '.join(shown + [left])}"
              f"{'' if dreaming else ', longer once it dreams'}", flush=True)
        for name, value in row.items() if board else ():
            board.add_scalar(name, value, run.epoch)
    print(f"final evaluation: {args.final_games} games", flush=True)
    returns, metrics = run.evaluate(args.final_games)
    result = dict(env=args.env, epoch=run.epoch, returns=returns.tolist(), **metrics)
    write_atomically(folder / "eval.json", json.dumps(result, indent=1).encode())
    print(f"{args.env}: mean return {returns.mean():.1f} (standard deviation {returns.std():.1f}) over {len(returns)} "
          f"games; pictures in {folder / 'media'}")


# ---- 11. Command line ------------------------------------------------------------------------------------------------
def new_run(args):
    """Makes the run's folder and its config.json, once all that can be wrong with the flags has been looked at."""
    make_env(args.env).close()
    if args.perceptual_loss != "none":
        try:
            load_lpips()
            args.perceptual_loss = "lpips"
        except InputError as error:
            if args.perceptual_loss == "lpips":
                raise
            args.perceptual_loss = "none"
            print(f"no perceptual loss, squared error alone: {error}")
    if args.reconstruction_loss == "auto":  # without LPIPS, squares learn small moving things much sooner
        args.reconstruction_loss = "l1" if args.perceptual_loss == "lpips" else "l2"
    game = re.sub(r".*/|-v\d+$", "", args.env)
    folder = Path(args.run_dir) / f"{game}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    write_atomically(folder / "config.json", json.dumps(vars(args), indent=1).encode())
    return folder

def main(argv=None):
    """Command line -> exit code: 0 done, 1 training diverged, 2 bad input, 130 stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    folder = None
    try:
        args = parse_args(argv)
        torch.backends.cudnn.deterministic = args.torch_deterministic
        torch.backends.cudnn.benchmark = not args.torch_deterministic
        folder = Path(args.resume) if args.resume else new_run(args)
        train(args, folder)
        return 0
    except InputError as error:
        message, code = str(error), 2
    except OSError as error:  # no such place, no right to write there, disk full
        message = f"{error.filename or folder}: {error.strerror or error}"
        message, code = message + (f"; once mended, go on with --resume {folder}" if folder else ""), 2
    except FloatingPointError as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = f"stopped; go on with python iris.py --resume {folder}" if folder else "stopped", 130
    print(f"iris.py: {' '.join(message.split())}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
