# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of iris.py
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6", "opencv-python==5.0.0.93"]
# ///
"""IRIS in one file: an agent that learns Atari inside its own dreams.

    python iris.py --env Pong

trains, scores, and draws what the agent dreams; --help lists the rest. The paper is "Transformers
are Sample-Efficient World Models" (Micheli, Alonso, Fleuret, ICLR 2023, arXiv:2209.00588).
Sections, equations and appendices cited below are the paper's; parts are this file's.
"""

# A discrete autoencoder turns every frame into a few tokens, so that a game becomes text. A GPT
# learns to continue that text: the next frame, the reward, the end. Sampling from the GPT, with
# predicted tokens fed back in place of a real frame's, is a dream of the game, and the policy learns
# only in dreams. The autoencoder and the GPT are trained on two hours of real play.
#
#      real frame                                    reward, end, next frame's tokens
#          |  encoder                                              ^
#      K = 16 tokens (vocabulary 512)  --------->  transformer over T = 20 steps of K + 1 tokens
#          |  decoder                                              ^
#      reconstructed frame  ---->  actor-critic (CNN, LSTM)  ----> action
#
# Parts 1 to 8 are IRIS as in the paper, and say where they are not. Part 9 is what this file adds for
# machines without a GPU (--preset small), mostly by overriding a few methods.
#
# Letters in shapes: N images, B batch, T time steps, K tokens per frame, S positions of the
# transformer (T (K + 1) for T whole steps), D its width, nh heads of size hs, V vocabulary, E size
# of a code, g = sqrt(K) side of the token grid, C channels, A actions, L size of the LSTM, H frames
# of a dream; the first is real, so it has H - 1 steps.
import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import socket
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

# Must come before torch: lets idle threads sleep sooner. Dreams run up to 20 times faster on shared cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


# ---- 1. Flags: the paper's numbers in one place (on a first reading, go on to part 2) ------------
class InputError(ValueError):
    """Invalid input, or a run that went wrong: main() prints it in one line, the exit code is 2."""


def parse_args(argv=None):
    """Command line -> flags, and the checkpoint of the run that --resume or --eval names."""
    parser = argparse.ArgumentParser("iris.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group()
    options = dict(metavar="RUN", type=lambda name: Path(os.path.expanduser(name)))
    modes.add_argument("--resume", **options, help="go on, perhaps for more --epochs")
    modes.add_argument("--eval", **options, help="score a run, and draw its dreams")
    devices = [name for name in ("cpu", "cuda", "mps") if getattr(torch, name).is_available()]
    device, preset = ("cuda", "paper") if "cuda" in devices else ("cpu", "small")
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)  # a CPU that computes in bfloat16
    presets = dict(paper={}, small={})

    def add_argument(flag, paper, small, text, choices=None):
        kind = dict(type=type(paper), choices=choices)
        if isinstance(paper, bool):
            kind = dict(action=argparse.BooleanOptionalAction)  # --name and --no-name
        text += f" [{paper}]" if paper == small else f" [paper {paper}, small {small}]"
        name = parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind).dest
        presets["paper"][name] = paper
        presets["small"][name] = small

    # Each flag with the paper's default, the small preset's, and what it does.
    add_argument("--env", "Pong", "Pong", "a game of ale-py: Pong, or ALE/Pong-v5")
    add_argument("--preset", preset, preset, "paper where CUDA is, else small", ["paper", "small"])
    add_argument("--run-dir", "runs", "runs", "folder for the folders of runs")
    add_argument("--seed", 1, 1, "of networks, sampling and games")
    add_argument("--device", device, device, "where to compute (mps is untried)", devices)
    add_argument("--mixed-precision", True, fast, "bfloat16 (authors: no), on newer GPUs and CPUs")
    # The schedule: an epoch collects real steps, then trains each network for some updates.
    add_argument("--epochs", 600, 20, "epochs in all")
    add_argument("--collect-epochs", 500, 20, "epochs that collect real steps")
    add_argument("--collect-steps", 200, 4000, "real steps per such epoch; 500 x 200 is Atari 100k")
    add_argument("--tokenizer-start", 6, 1, "first epoch that trains the tokenizer")
    add_argument("--world-model-start", 26, 1, "first epoch that trains the world model")
    add_argument("--actor-critic-start", 51, 4, "first epoch that trains the policy")
    add_argument("--tokenizer-updates", 200, 0, "updates per epoch (part 9's codes need none)")
    add_argument("--world-model-updates", 200, 600, "updates per epoch")
    add_argument("--actor-critic-updates", 200, 50, "batches of dreams per epoch")
    add_argument("--tokenizer-batch", 256, 64, "frames per update")
    add_argument("--world-model-batch", 64, 8, "segments per update")
    add_argument("--actor-critic-batch", 64, 64, "dreams per batch")
    add_argument("--actor-critic-minibatch", 64, 16, "dreams per update")
    add_argument("--learning-rate", 1e-4, 1e-3, "of Adam, for all three networks")
    add_argument("--weight-average", 0.0, 0.99, "decay of the average of the world model's weights")
    # Real play: how it explores, and how it is judged.
    add_argument("--epsilon", 0.01, 0.01, "share of random actions while collecting")
    add_argument("--temperature", 1.0, 1.0, "of the policy, while collecting (Freeway 0.01)")
    add_argument("--eval-temperature", 0.5, 1.0, "of the policy, in evaluations")
    add_argument("--eval-every", 5, 5, "epochs between evaluations")
    add_argument("--eval-games", 16, 4, "games per evaluation")
    add_argument("--final-games", 100, 30, "games in the final evaluation, and in --eval")
    # The networks.
    add_argument("--tokens-per-frame", 16, 16, "K; 64: finer, slower (appendix E)", [16, 64])
    add_argument("--vocab-size", 512, 768, "V: codes in the codebook")
    add_argument("--perceptual-loss", True, False, "LPIPS; downloads a VGG16")
    add_argument("--sequence-length", 20, 12, "T: steps that the transformer sees")
    add_argument("--layers", 10, 2, "transformer blocks")
    add_argument("--width", 256, 128, "D, a multiple of the 4 heads")
    add_argument("--dropout", 0.1, 0.0, "on embedding, attention and residuals")
    add_argument("--lstm-size", 512, 256, "L: size of the policy's memory")
    # Dreams, and what the policy makes of them.
    add_argument("--burn-in", 20, 4, "real frames that fill the policy's memory")
    add_argument("--context", 1, 3, "real frames the world model reads, the dream's first included")
    add_argument("--horizon", 20, 10, "H: frames of a dream")
    add_argument("--gamma", 0.995, 0.97, "discount: how far the policy looks ahead")
    add_argument("--td-lambda", 0.95, 0.95, "of the returns; 0: one step, 1: the whole dream")
    add_argument("--entropy-coef", 0.001, 0.05, "weight of the entropy bonus")
    given = vars(parser.parse_args(argv))  # only what stands on the command line
    run = given["resume"] or given["eval"]
    checkpoint = read_checkpoint(run) if run else {}
    saved = checkpoint.get("args", {})
    if run and saved.keys() != presets["paper"].keys():
        raise InputError(f"{run} was written by another version of iris.py, with other flags")
    # The preset's defaults, then the run's flags; the command line has the last word.
    values = presets[given.get("preset", preset)] | saved
    if values["device"] not in devices:
        values["device"] = "cpu"  # a run from a GPU can go on without one
    args = argparse.Namespace(**(values | given))
    # The same game is also known as ALE/Pong-v5, PongNoFrameskip-v4 or PongDeterministic-v4.
    args.env = re.sub(r"^(ALE/)?(\w+?)((NoFrameskip|Deterministic)?-v\d+)?$", r"\2", args.env)
    # --resume and --eval may change these flags, and raise --epochs and --collect-epochs.
    may_change = "device mixed_precision final_games eval_temperature".split()
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        old = saved.get(name, value)
        least = 1 if type(value) is int and name != "seed" and "updates" not in name else 0
        most = 1 if name in ("epsilon", "dropout", "gamma", "td_lambda", "weight_average") else 2**31 - 1
        if type(value) in (int, float) and not least <= value <= most:
            parser.error(f"{flag} {value} is out of range: {least} to {most}")
        more = "epochs" in name and value > old
        if value != old and name not in may_change and not more:
            parser.error(f"{flag} is {old} in {run}, and cannot become {value}")
    if not args.tokenizer_start <= args.world_model_start <= args.actor_critic_start:
        parser.error("--tokenizer-start, --world-model-start, --actor-critic-start: in this order")
    if args.context + args.horizon > args.sequence_length + 1 or args.horizon == 1:
        parser.error("--horizon must be 2 or more; + --context at most --sequence-length + 1")
    if args.context > args.burn_in or args.width % 4:
        parser.error("--context must be --burn-in or less, --width a multiple of the 4 heads")
    return args, checkpoint


# ---- 2. Environment: real Atari frames, two hours of them ----------------------------------------
def make_env(game, num_envs=1, training=True):
    """-> a gymnasium VectorEnv of RGB frames (num_envs, 1, h, w, 3) uint8."""
    # An action is held for 4 raw frames; the agent sees the maximum of the last two, because Atari
    # draws some things only in every other frame. In training, games begin with 0 to 29 no-ops (1 to
    # 30 in the authors' code), and a lost life ends the episode, but not the game.
    env_id = game if "/" in game else f"ale_py:ALE/{game}-v5"  # ale_py registers the games
    try:
        height, width, _ = gym.make(env_id).observation_space.shape
        picture = dict(img_height=height, img_width=width, grayscale=False, stack_num=1)
        rules = dict(frameskip=4, repeat_action_probability=0.0, reward_clipping=False)
        starts = dict(use_fire_reset=False, noop_max=30 if training else 1)  # exclusive
        limit = 20_000 if training else 108_000  # raw frames
        limits = dict(life_loss_info=training, max_num_frames_per_episode=limit)
        return gym.make_vec(env_id, num_envs=num_envs, **picture, **rules, **starts, **limits)
    except Exception as error:  # gymnasium and ale-py have errors of many kinds
        raise InputError(f"--env {game}: {error} (make_env wants a game of ale-py 0.12)") from None


def resize(frames):
    """Frames (N, 1, h, w, 3) uint8 in numpy, of any size -> (N, 64, 64, 3) uint8 in torch."""
    # Antialiased: every raw pixel counts, so that a small ball does not vanish between two samples.
    # (The authors resize each raw frame, and then take the maximum of two.)
    frames = torch.from_numpy(frames[:, 0]).movedim(-1, 1)
    frames = F.interpolate(frames, (64, 64), mode="bilinear", antialias=True)
    return frames.movedim(1, -1).contiguous()


class Game:
    """Real games, one after another, across epochs and across restarts of the program."""

    # Game number n is seeded with seed + n, and the emulator has no other randomness. So a checkpoint
    # holds the actions and no frames: load_run plays them again, which brings back every frame.
    def __init__(self, game, seed):
        self.env = make_env(game)
        self.seed = seed
        self.num_actions = int(self.env.single_action_space.n)
        self.begin(0)

    def begin(self, number):
        """Starts a game. `frame` (64, 64, 3) is what the player sees; is_first: it opens an episode."""
        frames, _ = self.env.reset(seed=(self.seed + number) % 2**31)
        self.frame = resize(frames)[0]
        self.is_first = True
        self.number = number
        self.score = 0.0

    def step(self, action):
        """-> reward, end (False on truncation), the game's score if it is over, else None."""
        frames, rewards, terminated, truncated, info = self.env.step(np.array([action]))
        reward = float(rewards[0])
        end = bool(terminated[0])  # running out of time is no end here (for the authors it is)
        self.is_first = end or bool(truncated[0])
        game_over = False
        while terminated[0] or truncated[0]:
            # gymnasium's next-step autoreset: the next episode's first frame comes with one more
            # step. The frame counter tells which of two things that step was:
            # - It went on: only a life was lost, and the step was a no-op in the same game. What it
            #   pays is credited to the action before (the authors drop it). It may lose another life,
            #   hence the loop.
            # - It went back: the game was over, and the step only fetched a new one's first frame.
            frame_number = info["episode_frame_number"][0]
            frames, rewards, terminated, truncated, info = self.env.step(np.array([0]))
            reward += float(rewards[0])
            game_over = bool(info["episode_frame_number"][0] < frame_number)
        self.frame = resize(frames)[0]
        self.score += reward
        score = self.score if game_over else None
        if game_over:
            self.begin(self.number + 1)  # not the emulator's own new game, but one with our seed
        return reward, end, score


# ---- 3. Replay: every real step, and what the tokenizer makes of it ------------------------------
CHUNK = 256  # frames tokenized at once: always this many, as a GPU tunes kernels for each new shape


class Replay:
    """All real steps, on the device: 100,000 are 2.5 GB, half of it reconstructed frames."""

    # Step i is a frame, the action taken in it, the reward that followed, and whether a life or the
    # game ended. An epoch trains the tokenizer first; what it makes of all frames is then kept: the world
    # model reads `tokens`, the policy sees `reconstructions` (bytes; the authors have floats).
    def __init__(self, args):
        n = args.collect_epochs * args.collect_steps + CHUNK  # the last chunk is tokenized whole
        with torch.device(args.device):
            self.frames = torch.zeros(n, 64, 64, 3, dtype=torch.uint8)
            self.actions = torch.zeros(n, dtype=torch.long)
            self.rewards = torch.zeros(n)
            self.ends = torch.zeros_like(self.actions)
            self.starts = torch.zeros_like(self.actions)  # of each episode, and of the next
            self.tokens = torch.zeros(n, args.tokens_per_frame, dtype=torch.long)
            self.reconstructions = torch.zeros_like(self.frames)
        self.size = self.episodes = 0
        self.tokenized = 0  # how many steps, from the first on, have tokens of the current tokenizer

    def record(self, game, action):
        """Takes a step in the game and appends it -> the game's score if it is over, else None."""
        if game.is_first:
            self.episodes += 1
        self.frames[self.size] = game.frame
        self.actions[self.size] = action
        reward, end, score = game.step(action)
        self.rewards[self.size] = reward
        self.ends[self.size] = end
        self.size += 1
        self.starts[self.episodes] = self.size  # the next episode's
        return score

    def sample(self, batch, steps, anchor="start"):
        """Segments of T = `steps` steps -> index (B, T) into the arrays above, valid (B, T)."""
        # Episodes are drawn uniformly, not steps, so that ends come up more often; the running
        # episode is one of them. Then one of its steps s = 0, 1, ... is drawn, as the first of the
        # segment or as its last:
        #   "start", the world model:   s  s+1  s+2  -   -     padding if the episode ends too early
        #   "end", the policy:          -   -    0   1   s     padding if it begins too late
        # Padding repeats the first or last step. Losses and the policy's memory skip it; --context does
        # not: early in an episode, the world model reads its first frame several times.
        episode = torch.randint(self.episodes, (batch, 1), device=self.starts.device)  # (B, 1)
        start = self.starts[episode]
        length = self.starts[episode + 1] - start
        s = (torch.rand_like(length, dtype=torch.float) * length).long().minimum(length - 1)
        first = start + s if anchor == "start" else start + s - (steps - 1)
        wanted = first + torch.arange(steps, device=first.device)  # (B, T)
        index = wanted.clamp(start, start + length - 1)
        return index, index == wanted


def to_network(frames):
    """Frames (..., 64, 64, 3) uint8 -> (..., 3, 64, 64) float in [-1, 1]."""
    return frames.movedim(-1, -3).contiguous().float() / 127.5 - 1


def to_bytes(frames):
    """Frames (..., 3, 64, 64) in [-1, 1] -> (..., 64, 64, 3) uint8."""
    frames = ((frames.float() + 1) * 127.5).round()
    return frames.to(torch.uint8).movedim(-3, -1)


# ---- 4. Tokenizer: a frame is K words (section 2.1, appendix A.1) --------------------------------
Norm = partial(nn.GroupNorm, 32, eps=1e-6)  # Norm(channels)
Conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)  # Conv3x3(channels in, channels out)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip connection, then perhaps attention; (N, C, h, w) -> the same."""

    # The skip connection lets gradients through unchanged, so that many blocks can be stacked.
    def __init__(self, channels, attention=False):
        super().__init__()
        layers = [Norm(channels), nn.SiLU(), Conv3x3(channels, channels)]
        layers += [Norm(channels), nn.SiLU(), Conv3x3(channels, channels)]
        self.layers = nn.Sequential(*layers)
        self.attention = SpatialAttention(channels) if attention else nn.Identity()

    def forward(self, x):
        return self.attention(x + self.layers(x))


class SpatialAttention(nn.Module):
    """Single-head self-attention between the h x w places; (N, C, h, w) -> the same."""

    # Convolutions look at neighbours; two paddles at opposite edges meet here.
    def __init__(self, channels):
        super().__init__()
        self.norm = Norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        # contiguous: a GPU's fused attention wants the channels side by side in memory
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # (N, h w, 3 C)
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # each (N, 1 head, h w, C)
        y = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))


class Tokenizer(nn.Module):
    """A VQGAN without its GAN: frames (N, 3, 64, 64) in [-1, 1] <-> tokens (N, K)."""

    def __init__(self, args):
        super().__init__()
        # Table 2: frames (N, 3, 64, 64) -> latents (N, E, K), and back. Sides of the grids: 64 .. g.
        C, E = 64, 512
        sizes = [size for size in (64, 32, 16, 8, 4) if size >= math.isqrt(args.tokens_per_frame)]
        encoder = [Conv3x3(3, C)]
        for size in sizes:
            # attention would cost too much on larger grids; size 4 has one in the middle, below
            encoder += [ResBlock(C, attention=size in (8, 16)) for _ in range(2)]
            if size > sizes[-1]:  # halve it; padded on the right and at the bottom only
                encoder += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(C, C, 3, stride=2)]
        encoder += [ResBlock(C, attention=True), ResBlock(C)]
        encoder += [Norm(C), nn.SiLU(), Conv3x3(C, E), nn.Conv2d(E, E, 1)]
        encoder.append(nn.Flatten(2))  # (N, E, g, g) -> (N, E, K), row by row
        decoder = [nn.Unflatten(2, (sizes[-1], sizes[-1]))]  # (N, E, g, g)
        decoder += [nn.Conv2d(E, E, 1), Conv3x3(E, C)]
        decoder += [ResBlock(C, attention=True), ResBlock(C)]
        for size in reversed(sizes):
            decoder += [ResBlock(C, attention=size in (8, 16)) for _ in range(3)]  # one more
            if size < 64:
                decoder += [nn.Upsample(scale_factor=2), Conv3x3(C, C)]
        decoder += [Norm(C), nn.SiLU(), Conv3x3(C, 3)]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)
        self.codebook = nn.Embedding(args.vocab_size, E)
        nn.init.uniform_(self.codebook.weight, -1 / args.vocab_size, 1 / args.vocab_size)

    def quantize(self, z):
        """Latents (N, E, K) -> tokens (N, K): each place's nearest code, by squared distance."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would confuse close codes
            z = z.float().transpose(1, 2)  # (N, K, E)
            codes = self.codebook.weight  # (V, E)
            # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every code e
            return (codes.square().sum(1) - 2 * (z @ codes.T)).argmin(-1)

    def embed(self, tokens):
        """Tokens (N, K) -> their codes z_q (N, E, K)."""
        return self.codebook(tokens).transpose(1, 2).contiguous()

    def encode(self, x):
        """Frames (N, 3, 64, 64) in [-1, 1] -> tokens (N, K)."""
        return self.quantize(self.encoder(x))

    def decode(self, tokens):
        """Tokens (N, K) -> frames (N, 3, 64, 64), clamped to [-1, 1], as the policy sees them."""
        return self.decoder(self.embed(tokens)).clamp(-1, 1)

    def loss(self, x, perceptual=None):
        """Equation 1 on frames x (N, 3, 64, 64) in [-1, 1] -> loss, metrics; LPIPS if given."""
        # |x - D(z_q)| + |sg(z) - z_q|^2 + |z - sg(z_q)|^2 + LPIPS(x, D(z_q)), each a mean; sg stops
        # the gradient. The first term is L1 as in the authors' code; the paper's text says L2.
        z = self.encoder(x)  # (N, E, K)
        z_q = self.embed(self.quantize(z))
        # argmin has no gradient, so the encoder would not learn from the picture. Straight through:
        # the value is z_q, the gradient passes to z as if nothing were rounded.
        x_hat = self.decoder(z + (z_q - z).detach())
        reconstruction = F.l1_loss(x_hat.float(), x)
        codebook = F.mse_loss(z_q, z.detach())  # pulls codes to latents
        commitment = F.mse_loss(z, z_q.detach())  # and latents to codes
        loss = reconstruction + codebook + commitment
        if perceptual is not None:
            loss = loss + perceptual(x, x_hat).mean()
        return loss, dict(tokenizer_loss=loss, reconstruction=reconstruction, commitment=commitment)


VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
HEADS_NAME = "lpips_vgg-a78928a0.pth"  # in torch hub's cache; downloads must have this hash
VGG_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers


def load_lpips(device):
    """-> lpips(x, y): how differently a VGG16 sees images (N, 3, h, w) in [-1, 1]; Zhang et al. 2018."""
    socket.setdefaulttimeout(30)  # seconds: a network that never answers must not hang the run
    # weights_only: code that a file may contain is never run.
    options = dict(map_location="cpu", weights_only=True, check_hash=True)
    try:  # torch hub's cache, or the net
        vgg = torch.hub.load_state_dict_from_url(VGG_URL, **options)
        heads = torch.hub.load_state_dict_from_url(HEADS_URL, file_name=HEADS_NAME, **options)
    except Exception as error:  # no network, a wrong hash, a damaged file
        raise InputError(
            f"no weights for LPIPS ({error!r:.100}): put {VGG_URL} and {HEADS_URL} (as {HEADS_NAME})"
            f" into {torch.hub.get_dir()}/checkpoints, or do without: --no-perceptual-loss"
        ) from None
    weights = {name: x.to(device) for name, x in (vgg | heads).items() if "classifier" not in name}
    shift = torch.tensor([-0.030, -0.088, -0.188], device=device).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], device=device).view(3, 1, 1)

    # Without dropout, which the authors leave on. In float32: bfloat16 distorts gradients of close images.
    @torch.autocast(device, enabled=False)
    def lpips(x, y):
        distance = 0  # (N,)
        images = [(image.float() - shift) / scale for image in (x, y)]
        for stage, convolutions in enumerate(VGG_STAGES):
            for i in convolutions:
                kernel, bias = weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]
                images = [F.relu(F.conv2d(image, kernel, bias, padding=1)) for image in images]
            a, b = [F.normalize(image, eps=1e-10) for image in images]
            head = weights[f"lin{stage}.model.1.weight"]  # channels' weights, fitted to human judgements
            difference = F.conv2d((a - b).square(), head)
            distance = distance + difference.mean((1, 2, 3))
            images = [F.max_pool2d(image, 2) for image in images]
        return distance

    return lpips


# ---- 5. World model: Atari as a language (a GPT; section 2.2, appendix A.2) ----------------------
# Step i has 16 frame tokens, zi0 ... zif (0 to f: hexadecimal), then action ai. What is predicted:
#   position     0    1  ...   14   15     16  |  17   18  ...   31   32     33  |  34
#   input       z00  z01 ...  z0e  z0f     a0  |  z10  z11 ...  z1e  z1f     a1  |  z20 ...
#   next token  z01  z02 ...  z0f    -    z10  |  z11  z12 ...  z1f    -    z20  |  z21 ...
#   reward, end                         r0, e0 |                          r1, e1 |
# z0f predicts no token: the action that comes next is the policy's. A token sees all to its left.
class Block(nn.Module):
    """Pre-norm transformer block: (B, S, D) -> the same."""

    def __init__(self, width, dropout, kv_heads):
        super().__init__()
        self.heads = 4
        self.kv_heads = kv_heads  # heads of keys and values: also four; in part 9 one for all
        self.head_size = width // self.heads
        self.dropout = dropout
        self.ln1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, width + 2 * kv_heads * self.head_size)
        self.proj = nn.Linear(width, width)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, cache=None, start=0):
        """x: positions 0 .. S - 1 (start = 0), or the one position `start`, which sees the earlier ones
        in the cache (B, 2 kv_heads, all positions, hs). Either way keys and values go into it."""
        B, S, _ = x.shape
        qkv = self.qkv(self.ln1(x)).unflatten(2, (-1, self.head_size)).transpose(1, 2)
        q, kv = qkv.split([self.heads, 2 * self.kv_heads], dim=1)  # (B, nh or 2 kv_heads, S, hs)
        if cache is not None:
            cache[:, :, start : start + S] = kv
            kv = cache[:, :, : start + S]
        k, v = kv.chunk(2, dim=1)
        if S == 1:  # heads that share keys become several queries of one head; with four, no change
            q = q.reshape(B, self.kv_heads, -1, self.head_size)
        dropout = self.dropout if self.training else 0.0
        options = dict(is_causal=(S > 1), enable_gqa=(q.shape[1] > k.shape[1]))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)
        y = y.reshape(B, self.heads, S, self.head_size).transpose(1, 2).flatten(2)  # (B, S, D)
        x = x + F.dropout(self.proj(y), dropout)
        return x + F.dropout(self.mlp(self.ln2(x)), dropout)


class WorldModel(nn.Module):
    """GPT over frame tokens and actions, with heads for next token, reward and end."""

    def __init__(self, args, num_actions, kv_heads=4, std=0.02):
        super().__init__()
        D, K, V = args.width, args.tokens_per_frame, args.vocab_size
        # The GPT learns its own embeddings, and never sees the tokenizer's codes.
        self.token_embedding = nn.Embedding(V, D)
        self.action_embedding = nn.Embedding(num_actions, D)
        self.pos_emb = nn.Embedding(args.sequence_length * (K + 1), D)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(D, args.dropout, kv_heads) for _ in range(args.layers))
        self.ln_f = nn.LayerNorm(D)

        def head(classes):
            return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, classes))

        # Three questions: the next token, and at actions the reward's sign (-1, 0, 1) and the end.
        self.head_token = head(V)
        self.head_reward = head(3)
        self.head_end = head(2)
        for name, parameter in self.named_parameters():
            if "ln" not in name:  # LayerNorms begin as the identity
                nn.init.normal_(parameter, 0.0, std)
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def token_vectors(self):
        """-> the embeddings of the whole vocabulary (V, D); part 9 adds to them."""
        return self.token_embedding.weight

    def embed(self, tokens, actions):
        """Tokens (B, T, K), actions (B, T) -> (B, S, D): a step's frame tokens, then its action."""
        tokens = F.embedding(tokens, self.token_vectors())  # (B, T, K, D)
        actions = self.action_embedding(actions)[:, :, None]  # (B, T, 1, D)
        return torch.cat([tokens, actions], dim=2).flatten(1, 2)

    def empty_caches(self, batch):
        """-> room for keys and values of all positions (layers, B, 2 kv_heads, S, hs)."""
        weight, block = self.pos_emb.weight, self.blocks[0]
        mixed = torch.is_autocast_enabled(weight.device.type)
        shape = (len(self.blocks), batch, 2 * block.kv_heads, len(weight), block.head_size)
        return weight.new_zeros(shape, dtype=torch.bfloat16 if mixed else torch.float32)

    def forward(self, x, caches=None, start=0):
        """Embedded positions from `start` on (B, S, D) -> hidden states (B, S, D); see Block."""
        x = self.dropout(x + self.pos_emb.weight[start : start + x.shape[1]])
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], start)
        return self.ln_f(x)

    def predict(self, tokens, actions):
        """Segments -> logits of tokens (B, T K, V), reward signs (B, T, 3), ends (B, T, 2)."""
        K = tokens.shape[2]
        h = self(self.embed(tokens, actions)).unflatten(1, (-1, K + 1))  # (B, T, K + 1, D)
        at_action = h[:, :, K]
        # Without the last frame token's position, K a step are left. They predict, in order, frame
        # tokens 1, 2, ... T K, where 0 is the segment's first, and T K the first of the frame after it.
        predicting = torch.cat([h[:, :, : K - 1], h[:, :, K:]], dim=2)
        token_logits = self.head_token(predicting).flatten(1, 2).float()
        return token_logits, self.head_reward(at_action).float(), self.head_end(at_action).float()

    def dream_reward(self, logits):
        """Logits of the signs (..., 3) -> what a dream pays (...): one of the signs, sampled."""
        return sample(logits) - 1.0

    def loss(self, tokens, actions, rewards, ends, valid):
        """Segments (B, T, ...) -> loss, metrics; the sum of three means over what is valid."""
        token_logits, reward_logits, end_logits = self.predict(tokens, actions)
        # The first token is given; the last action predicts a frame beyond the segment. -100 is skipped.
        targets = tokens.masked_fill(~valid[..., None], -100).flatten(1)[:, 1:]  # (B, T K - 1)
        token_loss = F.cross_entropy(token_logits[:, :-1].flatten(0, 1), targets.flatten())
        # Only signs: games pay in ones or in thousands, and one learning rate has to suit all. (The
        # paper's text has a squared error; the authors' code does this.)
        signs = (rewards.sign().long() + 1).masked_fill(~valid, -100)  # (B, T): classes 0, 1, 2
        reward_loss = F.cross_entropy(reward_logits.flatten(0, 1), signs.flatten())
        ends = ends.masked_fill(~valid, -100)
        end_loss = F.cross_entropy(end_logits.flatten(0, 1), ends.flatten())
        metrics = dict(token_loss=token_loss, reward_loss=reward_loss, end_loss=end_loss)
        return token_loss + reward_loss + end_loss, metrics


# ---- 6. Actor-critic: learns in dreams, plays for real (section 2.3, appendices A.3 and B) -------
def lambda_returns(rewards, values, ends, gamma, lambda_):
    """Appendix B: rewards and ends (B, H - 1), values (B, H) -> returns (B, H - 1)."""
    # G_t = r_t + gamma (1 - end_t) ((1 - lambda) V_{t+1} + lambda G_{t+1}), back from the last value.
    returns = values.clone()
    for t in reversed(range(rewards.shape[1])):
        target = (1 - lambda_) * values[:, t + 1] + lambda_ * returns[:, t + 1]
        returns[:, t] = rewards[:, t] + gamma * (1 - ends[:, t]) * target
    return returns[:, :-1]


class ActorCritic(nn.Module):
    """CNN and LSTM with a policy and a value head. Its memory, `state`, is (B, 2, L): h and c."""

    def __init__(self, args, num_actions, size=64):
        super().__init__()
        layers = []
        for channels, width in ((3, 32), (32, 32), (32, 64), (64, 64)):
            layers += [Conv3x3(channels, width), nn.MaxPool2d(2), nn.ReLU()]
        self.cnn = nn.Sequential(*layers, nn.Flatten())  # (N, 3, 64, 64) -> (N, 1024)
        # One frame shows no motion: the LSTM has to remember where the ball came from.
        self.lstm = nn.LSTMCell(64 * (size // 16) ** 2, args.lstm_size)  # size: side of the frames
        self.actor = nn.Linear(args.lstm_size, num_actions)
        self.critic = nn.Linear(args.lstm_size, 1)

    def initial_state(self, batch):
        """An empty memory of `batch` players, (batch, 2, L)."""
        return self.actor.weight.new_zeros(batch, 2, self.lstm.hidden_size)

    def forward(self, frames, state, valid=None):
        """Reconstructed frames (B, T, 3, 64, 64), memory before them -> logits (B, T, A), values
        (B, T), memory after them. Where `valid` (B, T) is false, on padding, memory is set to 0."""
        features = self.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        hidden = []
        with torch.autocast(frames.device.type, enabled=False):  # bfloat16's 8 bits are too few
            for t in range(frames.shape[1]):
                h_and_c = self.lstm(features[:, t].float(), state.unbind(1))
                state = torch.stack(h_and_c, dim=1)
                if valid is not None:
                    state = state * valid[:, t, None, None]
                hidden.append(state[:, 0])
            hidden = torch.stack(hidden, dim=1)  # (B, T, L)
            return self.actor(hidden), self.critic(hidden)[..., 0], state

    def scale(self, advantage, value_loss):
        """Advantages (B, H - 1), as they are; part 9 divides them by their RMS, sqrt(value_loss)."""
        return advantage

    def loss(self, dream, args):
        """A dream, as `imagine` returns it -> loss, metrics; appendix B."""
        # The dream was played without gradient; this pass over its frames has it.
        logits, values, _ = self(dream["frames"], dream["state"])  # (B, H, A), (B, H)
        rewards, ends = dream["rewards"], dream["ends"]  # (B, H - 1)
        returns = lambda_returns(rewards, values.detach(), ends, args.gamma, args.td_lambda)
        # Steps after an imagined end weigh nothing: the paper stops a dream there. The authors' code
        # dreams on, and leaves those steps in the policy's loss.
        alive = (ends.cumsum(1) - ends == 0).float()  # 1 up to and including the first end
        weight = alive / alive.sum()
        log_policy = logits[:, :-1].log_softmax(-1)  # the last frame has a value, no action
        log_chosen = log_policy.gather(-1, dream["actions"][..., None])[..., 0]  # (B, H - 1)
        # The critic learns the returns, the actor from returns minus values: REINFORCE with a baseline.
        advantage = returns - values[:, :-1]
        value_loss = (weight * advantage.square()).sum()
        policy_loss = -(weight * log_chosen * self.scale(advantage, value_loss).detach()).sum()
        # Entropy keeps the policy from settling on an action before it has tried the others.
        entropy = -(weight[..., None] * log_policy.exp() * log_policy).sum()
        metrics = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
        metrics["dream_return"] = (rewards * alive).sum(1).mean()
        return policy_loss + value_loss - args.entropy_coef * entropy, metrics


# ---- 7. Imagination: the world model as a game ---------------------------------------------------
class Agent(nn.Module):
    """The three networks, and how they act on real frames."""

    def __init__(self, args, num_actions):
        super().__init__()
        if args.preset == "small":  # part 9
            classes = LocalTokenizer, LocalWorldModel, WhitenedActorCritic
        else:
            classes = Tokenizer, WorldModel, ActorCritic
        self.tokenizer = classes[0](args)
        self.world_model = classes[1](args, num_actions)
        self.actor_critic = classes[2](args, num_actions)
        self.actor_critic.cnn.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
        self.to(args.device).eval()
        # What runs most often, faster (see accelerate).
        self.act = accelerate(self.act, args)
        self.dream = accelerate(partial(imagine, self, args.horizon - 1), args)

    @torch.no_grad()
    def act(self, frames, state, temperature):
        """Real frames (N, 64, 64, 3), memory, temperature -> actions (N,), memory."""
        # The policy learned from reconstructions, so real frames go through the tokenizer for it.
        # The temperature is a tensor: a number would be frozen in the CUDA graph (accelerate).
        reconstructions = self.tokenizer.decode(self.tokenizer.encode(to_network(frames)))
        logits, _, state = self.actor_critic(reconstructions[:, None], state)
        return sample(logits[:, 0] / temperature.clamp(min=1e-3)), state


def sample(logits):
    """Logits (..., n) -> classes (...), by inverting the cumulative distribution."""
    # torch.multinomial would make the CPU wait for a GPU at each of a dream's thousands of draws.
    cumulative = logits.float().softmax(-1).cumsum(-1)
    u = torch.rand(logits.shape[:-1], device=logits.device) * cumulative[..., -1]
    return (cumulative[..., :-1] <= u[..., None]).sum(-1)  # how many classes u has passed


@torch.no_grad()  # no graph is kept: ActorCritic.loss runs over the frames again, with gradient
def imagine(agent, steps, frames, valid, tokens, actions, forced_actions=None):
    """Dreams `steps` = H - 1 steps on from a real past -> dict of frames (B, H, 3, 64, 64) and tokens
    (B, H, K), both from the last real frame on; actions, rewards and ends (B, H - 1); state (B, 2, L),
    the policy's memory before the last real frame. forced_actions (B, H - 1) replace the policy's."""
    # frames (B, m, 3, 64, 64) are reconstructed real ones (training: m = --burn-in + 1), padding where
    # `valid` (B, m) is false; the last of them opens the dream. tokens (B, n, K) are those of the last n
    # (--context), actions (B, n - 1) what was done between them. `steps` times, the policy acts on the
    # newest frame, the world model predicts reward, end and next frame. The last frame only has a value:
    # nothing is done in it (the authors act there, to no effect).
    policy, world_model = agent.actor_critic, agent.world_model
    state = policy.initial_state(len(frames))
    if frames.shape[1] > 1:
        _, _, state = policy(frames[:, :-1], state, valid[:, :-1])
    burned_in = state
    dream = dict(frames=[frames[:, -1]], tokens=[tokens[:, -1]])
    dream.update(actions=[], rewards=[], ends=[])
    # Keys and values of the past are cached, so that a new position costs one position, not all.
    caches = world_model.empty_caches(len(frames))
    prompt = world_model.embed(tokens, F.pad(actions, (0, 1)))[:, :-1]  # the last action is yet to come
    world_model(prompt, caches)
    vectors = world_model.token_vectors()  # (V, D)
    K = tokens.shape[2]
    for t in range(steps):
        logits, _, state = policy(dream["frames"][-1][:, None], state)
        action = sample(logits[:, 0]) if forced_actions is None else forced_actions[:, t]
        vector = world_model.action_embedding(action)
        position = prompt.shape[1] + t * (K + 1)  # the action's
        h = world_model(vector[:, None], caches, position)[:, 0]  # (B, D)
        dream["actions"].append(action)
        dream["rewards"].append(world_model.dream_reward(world_model.head_reward(h).float()))
        dream["ends"].append(sample(world_model.head_end(h)).float())
        frame = []
        for k in range(1, K + 1):
            # The action predicts the first token, each token the next; an action follows the last one.
            token = sample(world_model.head_token(h))  # (B,)
            h = world_model(vectors[token][:, None], caches, position + k)[:, 0]
            frame.append(token)
        dream["tokens"].append(torch.stack(frame, dim=1))  # (B, K)
        dream["frames"].append(agent.tokenizer.decode(dream["tokens"][-1]))
    dream = {name: torch.stack(values, dim=1) for name, values in dream.items()}
    return dict(dream, state=burned_in)


def accelerate(function, args):
    """Wraps a function of tensors, without gradients: mixed precision; on a GPU a graph per shape."""
    # A dream is tens of thousands of tiny kernels, each quicker to run than to launch. A CUDA graph
    # records them once and replays them in one go; a call overwrites the outputs of the one before.
    # Autocast inside: a graph must cast the weights anew, since they change between its replays.
    run = torch.autocast(args.device, torch.bfloat16, args.mixed_precision)(function)
    graphs = {}

    def run_graph(*inputs):
        shapes = tuple(x.shape for x in inputs)
        if shapes not in graphs:
            # Recording draws random numbers. A resumed run records in another epoch than the run that
            # was never stopped, and must still draw the same numbers afterwards.
            with torch.random.fork_rng([torch.cuda.current_device()]):
                static = tuple(x.clone() for x in inputs)  # later inputs are copied into these
                graphs[shapes] = torch.cuda.make_graphed_callables(run, static)
        return graphs[shapes](*inputs)

    return run_graph if args.device == "cuda" else run


# ---- 8. Training: collect, then train the three networks, epoch after epoch ----------------------
SHOWN = "real_steps train_return tokenizer_loss token_loss dream_return entropy eval_return".split()


def say(text, stream=None, end="\n"):
    """Prints. Closed output or a full disk must not stop a run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=stream, flush=True)


def show(text):
    """Shows what is going on, in one line of the terminal, if there is one."""
    with contextlib.suppress(OSError):
        width = max(os.get_terminal_size(2).columns - 1, 1)  # 2 is stderr
        say(f"\r{text[:width]:{width}}\r", sys.stderr, end="")


def progress(count, label):
    """range(count), while the terminal shows how far it is."""
    begun = time.time()
    for i in range(count):
        yield i
        left = (time.time() - begun) * (count / (i + 1) - 1)
        show(f"{label} {i + 1}/{count}, {left:.0f} s left")


def update(log, name, network, optimizer, args, *inputs):
    """A step on network.loss(*inputs), the gradient's norm clipped to 10 (appendix A); logs metrics."""
    with torch.autocast(args.device, torch.bfloat16, args.mixed_precision):
        loss, metrics = network.loss(*inputs)
    loss.backward()
    metrics[f"{name}_gradient"] = nn.utils.clip_grad_norm_(network.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    for metric, value in metrics.items():
        # One growing tensor: small ones that stay, between large ones that go, would fill a CPU's heap
        # with holes (a list of scalars cost gigabytes).
        values = log.get(metric, value.new_empty(0))
        log[metric] = torch.cat([values, value.detach()[None]])


def collect(agent, game, replay, args):
    """Real steps, into the replay -> metrics."""
    temperature = torch.tensor(args.temperature, device=args.device)
    state = agent.actor_critic.initial_state(1)
    if not game.is_first:  # the weights have changed since the last epoch: rebuild the memory
        start = max(int(replay.starts[replay.episodes - 1]), replay.size - args.burn_in)
        for frame in replay.frames[start : replay.size]:
            _, state = agent.act(frame[None], state, temperature)
    scores = []
    for _ in progress(args.collect_steps, "collect"):
        if game.is_first:
            state = agent.actor_critic.initial_state(1)
        # Exploration comes from the policy's entropy and a few random actions.
        action, state = agent.act(game.frame[None].to(args.device), state, temperature)
        if torch.rand(1) < args.epsilon:
            action = torch.randint(game.num_actions, (1,))
        score = replay.record(game, int(action))
        if score is not None:  # of a whole game; an episode of the replay is one life
            scores.append(score)
    return dict(train_return=float(np.mean(scores))) if scores else {}


def train_tokenizer(agent, optimizer, replay, args, log, perceptual):
    """An epoch's updates on single frames."""
    for _ in progress(args.tokenizer_updates, "tokenizer"):
        index, _ = replay.sample(args.tokenizer_batch, 1)
        x = to_network(replay.frames[index[:, 0]])  # (B, 3, 64, 64)
        update(log, "tokenizer", agent.tokenizer, optimizer, args, x, perceptual)
        replay.tokenized = 0  # all tokens are stale now


@torch.no_grad()
def tokenize_replay(agent, replay, args):
    """Tokenizes what the current tokenizer has not seen yet, for the two phases that follow."""
    for start in range(replay.tokenized, replay.size, CHUNK):
        show(f"tokens: {start}/{replay.size} frames")
        part = slice(start, start + CHUNK)
        with torch.autocast(args.device, torch.bfloat16, args.mixed_precision):
            replay.tokens[part] = agent.tokenizer.encode(to_network(replay.frames[part]))
            replay.reconstructions[part] = to_bytes(agent.tokenizer.decode(replay.tokens[part]))
    replay.tokenized = replay.size // CHUNK * CHUNK  # a chunk that was not full is done again


def train_world_model(agent, optimizer, replay, args, log):
    """An epoch's updates on segments of T real steps."""
    world_model = agent.world_model.train()  # with dropout
    # With the small preset's learning rate the weights never come to rest. So its epochs end with a
    # moving average of the epoch's weights, from which the next epoch goes on.
    average = AveragedModel(world_model, multi_avg_fn=get_ema_multi_avg_fn(args.weight_average))
    for _ in progress(args.world_model_updates, "world model"):
        # Segments begin anywhere, so that every position sees every kind of frame.
        index, valid = replay.sample(args.world_model_batch, args.sequence_length)
        arrays = replay.tokens, replay.actions, replay.rewards, replay.ends
        segments = [array[index] for array in arrays]
        update(log, "world_model", world_model, optimizer, args, *segments, valid)
        if args.weight_average > 0:
            average.update_parameters(world_model)
    if args.weight_average > 0:
        world_model.load_state_dict(average.module.state_dict())
    world_model.eval()


def train_actor_critic(agent, optimizer, replay, args, log):
    """An epoch's updates in dreams."""
    for _ in progress(args.actor_critic_updates, "actor-critic"):
        # Dreams begin all over the replay: the policy practises wherever it has ever been.
        index, valid = replay.sample(args.actor_critic_batch, args.burn_in + 1, anchor="end")
        frames = to_network(replay.reconstructions[index])
        past = index[:, -args.context :]  # where the episode is shorter, its first step repeats
        dream = agent.dream(frames, valid, replay.tokens[past], replay.actions[past[:, :-1]])
        # The paper makes one update of a batch. The small preset splits it into minibatches, and
        # ignores that after the first the policy is not quite the one that dreamt.
        for i in range(0, args.actor_critic_batch, args.actor_critic_minibatch):
            minibatch = {name: x[i : i + args.actor_critic_minibatch] for name, x in dream.items()}
            update(log, "actor_critic", agent.actor_critic, optimizer, args, minibatch, args)


def make_optimizer(agent, lr):
    """-> one optimizer for all networks; a step leaves those without gradients alone; appendix A."""
    # Weight decay is for the world model's matrices only (without it, AdamW is Adam). Embeddings, gains
    # and biases must keep their size: a rare word would otherwise fade between two uses.
    linear = [m.weight for m in agent.world_model.modules() if isinstance(m, nn.Linear)]
    others = [weight for weight in agent.parameters() if weight not in set(linear)]
    groups = [dict(params=linear, weight_decay=0.01), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr, fused=True)  # fused: one kernel updates all


def train(args, folder, checkpoint):
    """The whole run: every epoch has its phases, and ends with a checkpoint."""
    torch.manual_seed(args.seed)
    game = Game(args.env, args.seed * 100_000)
    agent = Agent(args, game.num_actions)
    optimizer = make_optimizer(agent, args.learning_rate)
    replay = Replay(args)
    history = []  # one row of metrics per epoch
    if checkpoint:
        history = load_run(folder, checkpoint, agent, optimizer, game, replay)
    perceptual = load_lpips(args.device) if args.perceptual_loss else None
    if not checkpoint:
        folder.mkdir(parents=True)  # an error if it exists: two runs never share a folder
        save_run(folder, args, history, agent, optimizer, replay)  # even epoch 1 can be resumed
    size = sum(parameter.numel() for parameter in agent.parameters())
    say(f"{folder}: {args.preset} preset on {args.device}, {size:,} parameters")
    if args.epochs < args.actor_critic_start:
        say(f"The policy will not be trained: that would begin in epoch {args.actor_critic_start}.")
    for epoch in range(len(history) + 1, args.epochs + 1):
        # Every epoch has a seed of its own, so that a resumed run needs no generator's state.
        torch.manual_seed(args.seed * 100_000 + epoch)
        begun = time.time()
        row = dict(epoch=epoch)
        log = {}  # each metric's values, one per update
        # The tokenizer starts first, then the world model, which needs its tokens, then the policy,
        # which needs dreams worth learning from.
        if epoch <= args.collect_epochs:
            row |= collect(agent, game, replay, args)
        if epoch >= args.tokenizer_start:
            train_tokenizer(agent, optimizer, replay, args, log, perceptual)
        if args.preset == "small":
            adapt(agent, replay)  # part 9
        if epoch >= args.world_model_start:
            tokenize_replay(agent, replay, args)  # the tokenizer is frozen until the next epoch
            train_world_model(agent, optimizer, replay, args, log)
        # The policy learns in dreams only; real frames do no more than begin them.
        if epoch >= args.actor_critic_start:
            train_actor_critic(agent, optimizer, replay, args, log)
        # Only now: to read a value is to wait for the GPU, which then stands idle.
        for name, values in log.items():
            row[name] = values.mean().item()
            # A loss that is not finite has already spoilt the weights: stop before they are saved.
            if not math.isfinite(row[name]):
                raise InputError(f"{name} is {row[name]} in epoch {epoch}; {folder} still has the one before")
        # From here on nothing is trained: measure, save, show.
        row |= dict(real_steps=replay.size, seconds=time.time() - begun)
        if epoch % args.eval_every == 0:
            path = folder / "media" / f"epoch_{epoch:03d}"
            row["eval_return"] = evaluate(agent, args, args.eval_games, path)
        history.append(row)
        save_run(folder, args, history, agent, optimizer, replay)
        shown = ", ".join(f"{name} {row[name]:.6g}" for name in SHOWN if name in row)
        left = (args.epochs - epoch) * row["seconds"] / 60
        say(f"epoch {epoch}/{args.epochs}: {shown}, {left:.0f} min left at this pace")
    evaluate(agent, args, args.final_games, folder / "eval")


# ---- 9. The small preset: what makes a laptop enough ---------------------------------------------
# Dreams are slow on a CPU: the small preset has smaller networks, fewer and longer epochs, far fewer
# dreams, and what is here, one class for each network (.github/NOTES.md has the measurements).
class LocalTokenizer(Tokenizer):
    """Each token sees and draws one square of the screen, and its code is a little picture."""

    # A VQGAN's token can depend on the whole screen. In a short run the codes are spent on combinations
    # of paddles and scores, and the ball disappears first. Here encoder and decoder only cut a frame
    # into squares and put it together. Codes are picked from real frames; training them gains nothing.
    def __init__(self, args):
        super().__init__(args)
        side = 64 // math.isqrt(args.tokens_per_frame)
        self.encoder = nn.Unfold(side, stride=side)  # (N, 3, 64, 64) -> (N, E, K), E = 3 side^2
        self.decoder = nn.Fold(64, side, stride=side)  # and back
        self.codebook = nn.Embedding(args.vocab_size, 3 * side * side)
        self.register_buffer("picked", torch.tensor(0))  # how many codes are picked already

    def pick_codes(self, x):
        """Picks another quarter of the codes from frames x (N, 3, 64, 64)."""
        # Most squares are background. So a square is picked with probability proportional to its
        # squared distance from the nearest code (k-means++): something that is not drawn well yet.
        # Sixteen at a time, for speed; the first sixteen nearly at random. Codes are never replaced: what
        # the world model knows of them stays valid. Those not picked yet are noise, far from any square.
        squares = self.encoder(x).transpose(1, 2).flatten(0, 1)  # (N K, E)
        codes = self.codebook.weight
        first = int(self.picked)
        quarter = codes[first : first + math.ceil(len(codes) / 4)]
        distance = torch.cdist(squares, codes[: max(first, 1)]).square().min(dim=1).values
        for new in quarter.split(16):
            new.copy_(squares[torch.multinomial(distance + 1e-9, len(new))])
            distance = distance.minimum(torch.cdist(squares, new).square().min(dim=1).values)
        self.picked += len(quarter)


class LocalWorldModel(WorldModel):
    """A world model that sees the pixels of its words, and learns faster."""

    def __init__(self, args, num_actions):
        # The four heads share keys and values: a dream reads a quarter of the cache. GPT's initial std,
        # 0.02, makes a narrow network's first outputs tiny, and they take long to grow.
        std = 0.08
        super().__init__(args, num_actions, kv_heads=1, std=std)
        D, K = args.width, args.tokens_per_frame
        # A token is embedded by its square's pixels as well: what is learned about one token carries
        # over to all that look alike, which helps with rare rewards.
        self.project_pixels = nn.Linear(3 * 64 * 64 // K, D, bias=False)
        nn.init.normal_(self.project_pixels.weight, 0.0, std)
        self.register_buffer("codes", torch.zeros(args.vocab_size, 3 * 64 * 64 // K))  # set by adapt
        # Positions begin as step + place in the step: what is learned at one step helps at others.
        steps = std * torch.randn(args.sequence_length, 1, D)
        places = std * torch.randn(K + 1, D)
        self.pos_emb.weight.data.copy_((steps + places).flatten(0, 1))

    def token_vectors(self):
        """-> the embeddings of the whole vocabulary (V, D); pixels are centred and scaled."""
        pixels = self.codes - self.codes.mean(0)
        pixels = pixels / (pixels.square().sum(1).mean().sqrt() + 1e-6)
        return self.token_embedding.weight + self.project_pixels(pixels)

    def dream_reward(self, logits):
        """Dreams pay the expected sign: much the same gradient on average, with less noise."""
        probabilities = logits.softmax(-1)
        return probabilities[..., 2] - probabilities[..., 0]


class WhitenedActorCritic(ActorCritic):
    """A policy that sees how a frame differs from the average one."""

    def __init__(self, args, num_actions):
        super().__init__(args, num_actions, size=32)  # each pixel is the mean of four
        self.register_buffer("mean", torch.zeros(3, 32, 32))
        self.register_buffer("std", torch.ones(3, 32, 32))
        # torch's default weights shrink differences between frames to a few percent: in so few updates
        # a policy that begins with them learns nothing.
        for parameter in self.cnn.parameters():
            if parameter.dim() > 1:  # not a bias
                nn.init.orthogonal_(parameter, math.sqrt(2))
        nn.init.orthogonal_(self.lstm.weight_ih)

    def measure(self, frames):
        """Takes each pixel's mean and standard deviation over frames (N, 3, 64, 64)."""
        pixels = F.avg_pool2d(frames, 2)
        self.mean.copy_(pixels.mean(0))
        # 0.05^2 keeps pixels that hardly ever change from being blown up.
        self.std.copy_((pixels.var(0, correction=0) + 0.05**2).sqrt())

    def forward(self, frames, state, valid=None):
        """Sees pixels as differences from their means, else the common background would dominate."""
        pixels = F.avg_pool2d(frames.flatten(0, 1), 2).unflatten(0, frames.shape[:2])
        pixels = ((pixels - self.mean) / self.std).clamp(-5, 5)
        return super().forward(pixels, state, valid)

    def scale(self, advantage, value_loss):
        """Advantages divided by their RMS: then entropy weighs the same in all games."""
        return advantage / (value_loss.sqrt() + 0.01)  # 0.01: noise stays small where nothing is paid


@torch.no_grad()
def adapt(agent, replay):
    """Once an epoch: the three networks take what they need from the real frames so far."""
    tokenizer = agent.tokenizer
    x = to_network(replay.frames[torch.randperm(replay.size)[:4096]])
    if tokenizer.picked < len(tokenizer.codebook.weight):
        tokenizer.pick_codes(x)
        replay.tokenized = 0
    agent.world_model.codes.copy_(tokenizer.codebook.weight)
    agent.actor_critic.measure(tokenizer.decode(tokenizer.encode(x[:2048])))


# ---- 10. Evaluation: whole real games ------------------------------------------------------------
# Mean scores of random play, of a human, and of IRIS (the paper's five seeds).
SCORES = """
Alien 227.8 7127.7 420.02 | Amidar 5.8 1719.5 142.98 | Assault 222.4 742 1524.4
Asterix 210 8503.3 853.6 | BankHeist 14.2 753.1 53.08 | BattleZone 2360 37187.5 13074
Boxing 0.1 12.1 70.06 | Breakout 1.7 30.5 83.66 | ChopperCommand 811 7387.8 1565
CrazyClimber 10780.5 35829.4 59324.2 | DemonAttack 152.1 1971 2034.36 | Freeway 0 29.6 31.06
Frostbite 65.2 4334.7 259.12 | Gopher 257.6 2412.5 2236.12 | Hero 1027 30826.4 7037.4
Jamesbond 29 302.8 462.7 | Kangaroo 52 3035 838.2 | Krull 1598 2665.5 6616.42
KungFuMaster 258.5 22736.3 21759.8 | MsPacman 307.3 6951.6 999.06 | Pong -20.7 14.6 14.6
PrivateEye 24.9 69571.3 100 | Qbert 163.9 13455 745.72 | RoadRunner 11.5 7845 9614.6
Seaquest 68.4 42054.7 661.32 | UpNDown 533.4 11693.2 3546.2
"""


def play_games(agent, args, games):
    """Whole games side by side -> returns (games,), and 300 frames, actions, rewards of the first."""
    # All games start at once, and we wait for the longest: the first to finish are usually lost ones,
    # and a mean over those would be too low.
    env = make_env(args.env, games, training=False)
    # Other seeds than training's, though Atari without no-ops uses none: only actions are random.
    seeds = args.seed * 100_000 + 50_000 + np.arange(games)
    frames, _ = env.reset(seed=seeds % 2**31)
    torch.manual_seed(args.seed)  # evaluations can be repeated
    temperature = torch.tensor(args.eval_temperature, device=args.device)
    state = agent.actor_critic.initial_state(games)
    returns = np.zeros(games)
    playing = np.ones(games, dtype=bool)
    recording = []
    while playing.any():
        show(f"evaluation: {playing.sum()} of {games} games go on, mean so far {returns.mean():.1f}")
        resized = resize(frames)
        # The policy's memory begins empty and lasts for the whole game (in training, for a life).
        actions, state = agent.act(resized.to(args.device), state, temperature)
        frames, rewards, terminated, truncated, _ = env.step(actions.cpu().numpy())
        returns += rewards * playing  # a game that is over waits for the others
        if playing[0] and len(recording) < 300:  # copies: a view would keep the frames of all games
            moment = resized[0].clone(), actions[0].clone(), torch.tensor(float(rewards[0]))
            recording.append(moment)
        playing &= ~(terminated | truncated)
    return returns, [torch.stack(column).to(args.device) for column in zip(*recording)]


def evaluate(agent, args, games, path, **more):
    """Plays whole games, prints the score, writes PATH.json, and the pictures -> the mean score."""
    returns, recording = play_games(agent, args, games)
    mean = float(returns.mean())
    result = dict(game=args.env, seed=args.seed, temperature=args.eval_temperature, mean=mean, **more)
    line = f"{args.env}: {mean:.1f}"
    if returns.std() > 0:  # half of the 95 % interval of the mean; none if all scores are equal
        result["interval"] = float(1.96 * returns.std() / math.sqrt(games - 1))
        line += f" +- {result['interval']:.1f} (95 %)"
    line += f", games: {games}"
    known = re.search(rf"\b{args.env} (\S+) (\S+) (\S+)", SCORES)
    if known:  # games become comparable on a scale where 0 is random play and 1 a human
        random, human, iris = map(float, known.groups())
        line += f"; random {random}, human {human}, IRIS {iris}"
        line += f"; normalised {(mean - random) / (human - random):.3f}"
    say(f"{line} ({path}.json, .png, .webp)")
    result["returns"] = returns.tolist()
    write(path.with_suffix(".json"), json.dumps(result, indent=1).encode())
    if len(recording[0]) > 1:
        write_pictures(agent, args, recording, path)
    return mean


# ---- 11. Files: a checkpoint has all that the next epoch needs -----------------------------------
def write(path, data):
    """Writes bytes. A file that cannot be written is reported, but does not stop the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        say(f"iris.py: not written: {error}", sys.stderr)


def save_run(folder, args, history, agent, optimizer, replay):
    """Writes checkpoint.pt (an OSError stops the run), and metrics.csv for people."""
    # Frames and tokens follow from the actions (see Game). So do the rewards, which load_run compares.
    flags = {k: v for k, v in vars(args).items() if k not in ("resume", "eval")}
    state = dict(args=flags, history=history, agent=agent.state_dict(), optimizer=optimizer.state_dict())
    state["actions"] = replay.actions[: replay.size].clone()
    state["rewards"] = replay.rewards[: replay.size].clone()
    buffer = io.BytesIO()  # on a full disk, torch.save to a file would end in an error of its own
    torch.save(state, buffer)
    # All or nothing, even in a power cut: a rename is atomic, a write is not.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        with open(f"{temporary}/checkpoint.pt", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # on disk before the rename
        os.replace(file.name, folder / "checkpoint.pt")
    names = dict.fromkeys(name for row in history for name in row)  # in order, each once
    lines = [",".join(names)]
    for row in history:
        lines.append(",".join(str(row.get(name, "")) for name in names))
    write(folder / "metrics.csv", ("\n".join(lines) + "\n").encode())


def read_checkpoint(run):
    """A run's folder -> its checkpoint, without running code in it, else InputError."""
    path = run / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # compares checksums, which torch.load does not
                raise ValueError("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return dict(state, args=dict(state["args"]))
    except Exception as error:  # zipfile, pickle and torch have errors of their own
        raise InputError(f"{path} is missing, damaged, or foreign ({error!r:.80})") from None


def load_weights(run, checkpoint, agent):
    """Puts a checkpoint's weights into the agent, else InputError."""
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{run} was written by another version: {str(error)[:150]}") from None


def load_run(run, checkpoint, agent, optimizer, game, replay):
    """Restores everything that a run's checkpoint holds -> history."""
    load_weights(run, checkpoint, agent)
    if "optimizer" not in checkpoint:
        raise InputError(f"{run} has only weights, for --eval, and cannot be resumed")
    optimizer.load_state_dict(checkpoint["optimizer"])
    # Playing 100,000 steps again takes a minute or two; their frames would be 1.2 GB on disk.
    actions = checkpoint["actions"].tolist()
    for i in progress(len(actions), "play again"):
        replay.record(game, actions[i])
    if not torch.equal(replay.rewards[: replay.size].cpu(), checkpoint["rewards"]):
        raise InputError(f"{run}: its actions do not bring back its rewards: another ale-py?")
    return checkpoint["history"]


# ---- 12. Pictures: a world model is something to look at -----------------------------------------
def draw(rows, scale):
    """Rows of frames (R, n, 3, 64, 64) in [-1, 1] -> an image for OpenCV, enlarged."""
    image = to_bytes(rows).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (64 R, 64 n, 3)
    image = image.flip(-1).cpu().numpy()  # BGR
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)


@torch.no_grad()
def write_pictures(agent, args, recording, path):
    """PATH.webp and PATH.png: a recorded game, and dreams in which the same actions are taken."""
    frames, actions, rewards = recording
    real = to_network(frames)  # (n, 3, 64, 64)
    tokens = agent.tokenizer.encode(real)  # (n, K)
    decoded = agent.tokenizer.decode(tokens)
    # One dream after another: each knows T / 2 steps, and dreams the T / 2 that follow.
    T = min(args.sequence_length, len(frames))
    known = T // 2
    index = torch.arange(len(frames), device=frames.device).unfold(0, T, T - known)  # (B, T)
    past, future = index[:, :known], index[:, known - 1 :]  # the last known frame is in both
    pasts = decoded[past], torch.ones_like(past), tokens[past], actions[past[:, :-1]]
    torch.manual_seed(args.seed)
    dream = imagine(agent, T - known, *pasts, actions[future[:, :-1]])
    # The film: real, decoded from its tokens, dreamt, side by side; (3, B, T / 2 + 1, 3, 64, 64)
    rows = torch.stack([real[future], decoded[future], dream["frames"]])
    film = cv2.Animation()
    steps = rows[:, :, 1:].flatten(1, 2).transpose(0, 1)  # (B T / 2, 3, 3, 64, 64)
    film.frames = [draw(step[None], 3) for step in steps]
    film.durations = np.full(len(film.frames), 80)  # milliseconds
    lossless = [cv2.IMWRITE_WEBP_QUALITY, 101]  # and smaller than lossy, for large plain pixels
    _, data = cv2.imencodeanimation(".webp", film, lossless)
    write(path.with_suffix(".webp"), data.tobytes())
    # The picture: the same in rows, four moments of the first dream in which something is really
    # paid, if there is one.
    paid = (rewards[future[:, :-1]] != 0).any(1)  # (B,)
    b = int(paid.float().argmax())
    moments = torch.linspace(0, T - known, 4).long()
    _, data = cv2.imencode(".png", draw(rows[:, b, moments], 4))
    write(path.with_suffix(".png"), data.tobytes())


# ---- 13. Command line ----------------------------------------------------------------------------
def main(argv=None):
    """Command line -> exit code: 0 done, 2 failed (a line says why), 130 stopped."""
    # The one place where exceptions become one-line messages. Bugs still give tracebacks.
    folder, code = None, 2
    try:
        args, checkpoint = parse_args(argv)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.enable_cudnn_sdp(False)  # would plan anew for 300 shapes of a dream
        if args.eval:
            agent = Agent(args, Game(args.env, 0).num_actions)
            load_weights(args.eval, checkpoint, agent)
            saved = checkpoint["args"]
            changed = {k: v for k, v in vars(args).items() if v != saved.get(k, v)}
            path = args.eval / time.strftime("eval-%Y%m%d-%H%M%S")  # eval.json is training's own
            evaluate(agent, args, args.final_games, path, changed_flags=changed)
        else:
            moment = time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
            name = f"{args.env.replace('/', '-')}__{args.seed}__{moment}"
            folder = args.resume or Path(os.path.expanduser(args.run_dir)) / name
            train(args, folder, checkpoint)
        return 0
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    except (InputError, FileExistsError) as error:
        folder, message = None, f"error: {error}"  # resuming would not help, or it is another run's folder
    except (OSError, MemoryError, RuntimeError) as error:
        # Only RuntimeErrors of a GPU or of an allocator are the machine's fault.
        machine = isinstance(error, torch.AcceleratorError) or "alloc" in str(error).lower()
        if isinstance(error, RuntimeError) and not machine:
            raise
        message = f"error: {error}" if str(error) else "error: out of memory"
    say("iris.py: " + " ".join(message.split())[:600], sys.stderr)
    if folder and os.path.exists(folder / "checkpoint.pt"):
        command = shlex.join(["python", sys.argv[0], f"--resume={folder}"])
        say(f"Go on from the last whole epoch: {command}", sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
