# SPDX-License-Identifier: MIT
"""IRIS in one file: an agent that learns Atari inside its own dreams.

    python iris.py --env Pong

trains, evaluates, and draws what the agent dreams; --help lists the other modes. The paper is
"Transformers are Sample-Efficient World Models" (Micheli, Alonso, Fleuret, ICLR 2023, arXiv:2209.00588).
Sections, equations and appendices cited below are that paper's; parts are this file's.
"""

# A discrete autoencoder turns every frame into a few tokens, so that a game becomes text. A GPT
# learns to continue that text: the next frame, the reward, the end. Sampling from the GPT is a dream
# of the game, and the policy learns only in dreams. The autoencoder and the GPT are trained on two
# hours of real play.
#
#      real frame                                    reward, end, next frame's tokens
#          |  encoder                                              ^
#      K = 16 tokens (vocabulary 512)  --------->  transformer over T = 20 steps of K + 1 tokens
#          |  decoder                                              ^
#      reconstructed frame  ---->  actor-critic (CNN, LSTM)  ----> action
#
# In a dream the next frame's tokens take the place of the real frame's, and so on, step after step.
#
# Read it from top to bottom. Letters in shapes: N images, B batch, T time steps, K tokens per frame,
# S positions of the transformer (T (K + 1) for T whole steps), D its width, nh heads of size hs, V
# vocabulary, E size of a code, g = sqrt(K) side of the token grid, C channels, A actions, L size of
# the LSTM, H frames of a dream (the first is real, so H - 1 steps).
import argparse
import copy
import io
import json
import math
import os
import re
import shlex
import socket
import sys
import time
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

# Set before torch is imported: idle threads go to sleep sooner, which makes dreams up to twenty
# times as fast where cores are shared.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import ale_py  # noqa: F401 (importing it registers the games)
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- 1. Flags: the paper's numbers in one place (on a first reading, go on to part 2) ------------
# The paper preset follows the authors' code where the paper's text differs. The small preset is the
# same idea for a machine without a GPU: smaller networks, tokens that are local (part 4), a shorter
# schedule, other initial weights, a policy that sees what moves (part 6), and dreams from averaged
# weights (train_world_model). On a CPU dreams are slow and real steps are not: the small preset
# collects 4000 of them in seconds, and makes four updates per batch of dreams, each on a quarter.

# What --resume may change.
MAY_CHANGE = ("epochs", "collect_epochs", "device", "mixed_precision", "final_games", "tensorboard")


class InputError(ValueError):
    """Invalid input. main() prints it in one line and exits with code 2."""


def make_parser(preset):
    """-> the parser of all flags, with the defaults of a preset, "paper" or "small"."""
    parser = argparse.ArgumentParser("iris.py", usage="iris.py --env Pong [--help]", allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def add_argument(name, default, text, choices=None, small=None):
        shown = str(default)
        if small is not None:  # the presets differ
            shown = f"paper {default}, small {small}"
            default = small if preset == "small" else default
        options = dict(type=type(default), choices=choices)
        if isinstance(default, bool):
            options = dict(action=argparse.BooleanOptionalAction)  # --name and --no-name
        parser.add_argument(name, default=default, help=f"{text} [{shown}]", **options)

    # The modes; without one, it trains.
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", type=Path, metavar="RUN", help="continue a run, for more --epochs")
    modes.add_argument("--eval", type=Path, metavar="RUN", help="score a run, or the authors' Pong.pt")
    modes.add_argument("--play", type=Path, metavar="RUN", help="play inside a run's world model yourself")
    modes.add_argument("--dream", type=Path, metavar="RUN", help="picture and film of a run's dreams")
    add_argument("--env", "Pong", "game: Pong, or ALE/Pong-v5")
    add_argument("--preset", "auto", "auto: paper on CUDA, else small", choices=("auto", "paper", "small"))
    add_argument("--exp-name", "iris", "goes into the run's name")
    add_argument("--run-dir", "runs", "folder for the folders of runs")
    add_argument("--seed", 1, "of networks, sampling and games")
    add_argument("--device", device, "where to compute", choices=sorted({"cpu", device}))
    add_argument("--mixed-precision", True, "bfloat16: fast on GPUs from Ampere on", small=False)
    add_argument("--torch-deterministic", False, "reproducible on a GPU where torch can; slower")
    add_argument("--tensorboard", False, "write events for TensorBoard as well")
    # The schedule: an epoch collects real steps, then trains each network for some updates. A
    # network that starts too early learns from another that knows nothing yet.
    add_argument("--epochs", 600, "epochs in all", small=20)
    add_argument("--collect-epochs", 500, "epochs that collect real steps", small=20)
    add_argument("--collect-steps", 200, "real steps per such epoch: 500 x 200 is Atari 100k", small=4000)
    add_argument("--tokenizer-start", 6, "first epoch that trains the tokenizer", small=1)
    add_argument("--world-model-start", 26, "first epoch that trains the world model", small=1)
    add_argument("--actor-critic-start", 51, "first epoch that trains the policy", small=4)
    add_argument("--tokenizer-updates", 200, "updates per epoch", small=20)
    add_argument("--world-model-updates", 200, "updates per epoch", small=400)
    add_argument("--actor-critic-updates", 200, "batches of dreams per epoch", small=40)
    add_argument("--tokenizer-batch", 256, "frames per update", small=64)
    add_argument("--world-model-batch", 64, "segments per update", small=8)
    add_argument("--actor-critic-batch", 64, "dreams side by side")
    add_argument("--actor-critic-minibatch", 64, "dreams per update", small=16)
    add_argument("--tokenizer-lr", 1e-4, "learning rate of Adam")
    add_argument("--world-model-lr", 1e-4, "learning rate of AdamW", small=1e-3)
    add_argument("--ema-decay", 0.0, "of the moving average of the world model's weights", small=0.995)
    add_argument("--actor-critic-lr", 1e-4, "learning rate of Adam", small=1e-3)
    # Real play: how it explores, and how it is judged.
    add_argument("--epsilon", 0.01, "share of random actions while collecting")
    add_argument("--temperature", 1.0, "of the policy, while collecting (Freeway 0.01)")
    add_argument("--eval-temperature", 0.5, "of the policy, in evaluations", small=1.0)
    add_argument("--eval-every", 5, "epochs between evaluations")
    add_argument("--eval-games", 16, "games per evaluation", small=4)
    add_argument("--final-games", 100, "games in the final evaluation, and in --eval", small=30)
    # The networks.
    add_argument("--local-tokens", False, "each token sees and draws only its own square", small=True)
    add_argument("--tokens-per-frame", 16, "K; 64: finer, slower (appendix E)", choices=(16, 64))
    add_argument("--vocab-size", 512, "V: codes in the codebook", small=768)
    add_argument("--perceptual-loss", True, "LPIPS; downloads a VGG16", small=False)
    add_argument("--reconstruction-loss", "l1", "the text says l2; moot for local tokens", choices=("l1", "l2"))
    add_argument("--sequence-length", 20, "T: steps that the transformer sees", small=12)
    add_argument("--layers", 10, "transformer blocks", small=2)
    add_argument("--width", 256, "D, a multiple of the 4 heads", small=128)
    add_argument("--dropout", 0.1, "on embedding, attention and residuals", small=0.0)
    add_argument("--reward-loss", "cross-entropy", "the text says mse", choices=("cross-entropy", "mse"))
    add_argument("--policy-size", 64, "side of what the policy sees, in pixels", choices=(16, 32, 64), small=32)
    add_argument("--lstm-size", 512, "L: size of the policy's memory", small=256)
    # Dreams, and what the policy makes of them.
    add_argument("--burn-in", 20, "real frames that fill the policy's memory", small=4)
    add_argument("--context", 1, "real frames the world model sees, the dream's first included", small=3)
    add_argument("--horizon", 20, "H: frames of a dream", small=10)
    add_argument("--draw-rewards", True, "dreams pay a reward's sign, sampled, not its mean", small=False)
    add_argument("--gamma", 0.995, "discount: how far the policy looks ahead", small=0.97)
    add_argument("--td-lambda", 0.95, "lambda of the returns; 0: one step, 1: the whole dream")
    add_argument("--norm-advantage", False, "scale advantages to one size in all games", small=True)
    add_argument("--entropy-coef", 0.001, "weight of the entropy bonus", small=0.05)
    return parser


def parse_args(argv=None):
    """Command line -> namespace of flags. Bad ones raise InputError, or argparse's SystemExit."""
    # The first pass only finds out which defaults the second needs: those of a preset, or of a run.
    args = make_parser("paper").parse_args(argv)
    run = args.resume or args.eval or args.dream or args.play
    if run and run.name == "checkpoint.pt":  # treated like its folder
        run = run.parent
    if args.resume and run.is_file():
        raise InputError(f"{run} is a file: --resume wants a run's folder")
    saved = read_checkpoint(run).get("args", {}) if run else {}
    if args.resume and not saved:
        raise InputError(f"{run} has only weights, as the authors' files do, and cannot be resumed")
    if run and not saved:
        saved = dict(env=run.stem, preset="paper")  # of an authors' Pong.pt
    preset = saved.get("preset", args.preset)
    if preset == "auto":
        preset = "small" if args.device == "cpu" else "paper"
    parser = make_parser(preset)
    parser.set_defaults(**saved)
    if not torch.cuda.is_available():
        parser.set_defaults(device="cpu")  # a run from a GPU can continue without one
    args = parser.parse_args(argv)
    if args.preset == "auto":
        args.preset = preset
    args.run = run
    # The same game is also known as PongNoFrameskip-v4 or PongDeterministic-v4.
    args.game = re.sub(r"(NoFrameskip|Deterministic)?-v\d+$", "", args.env.removeprefix("ALE/"))
    if "/" not in args.env or args.env.startswith("ALE/"):
        args.env = f"ALE/{args.game}-v5"
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        least = 1 if type(value) is int and name != "seed" else 0
        most = 1 if name in ("epsilon", "dropout", "gamma", "td_lambda", "ema_decay") else math.inf
        if type(value) in (int, float) and not least <= value <= most:
            raise InputError(f"{flag} {value} is out of range")
        if args.resume and name not in MAY_CHANGE and value != saved.get(name, value):
            raise InputError(f"{flag} is {saved[name]} in {run}, and cannot change when resumed")
    if args.resume and args.collect_epochs < saved["collect_epochs"]:
        raise InputError(f"--collect-epochs can only be raised; it is {saved['collect_epochs']} in {run}")
    if not args.tokenizer_start <= args.world_model_start <= args.actor_critic_start:
        raise InputError("--tokenizer-start <= --world-model-start <= --actor-critic-start: each needs the one before")
    if not 1 < args.horizon <= args.sequence_length + 1 - args.context or args.context > args.burn_in:
        raise InputError("--horizon >= 2, --context + --horizon <= --sequence-length + 1, --context <= --burn-in")
    if args.local_tokens and args.perceptual_loss:
        raise InputError("LPIPS teaches encoder and decoder, and --local-tokens have none: --no-perceptual-loss")
    if args.width % 4 or args.seed >= 2**31:
        raise InputError("--width must be a multiple of the 4 heads, --seed below 2**31")
    return args


# ---- 2. Environment: real Atari frames, two hours of them ----------------------------------------
def make_env(env_id, num_envs=1, training=True):
    """-> a gymnasium VectorEnv of RGB frames (num_envs, 1, h, w, 3) uint8."""
    # An action is held for 4 raw frames; the agent sees the maximum of the last two, because Atari
    # draws some things only in every other frame. In training, games begin with 0 to 29 no-ops, and
    # a lost life ends the episode, but not the game. To use a game of another kind, replace this
    # function; Game reads info["episode_frame_number"].
    try:
        height, width, _ = gym.make(env_id).observation_space.shape
        seen = dict(img_height=height, img_width=width, grayscale=False, stack_num=1, frameskip=4)
        rules = dict(repeat_action_probability=0.0, reward_clipping=False, use_fire_reset=False)
        rules["life_loss_info"] = training
        rules["noop_max"] = 30 if training else 1  # no-ops are drawn below this: 1 gives none
        rules["max_num_frames_per_episode"] = 20_000 if training else 108_000  # raw frames
        return gym.make_vec(env_id, num_envs=num_envs, **seen, **rules)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        raise InputError(f"--env {env_id}: {error} (make_env wants a game of ale-py 0.12)") from None


def resize(frames):
    """Frames (N, 1, h, w, 3) uint8 in numpy, of any size -> (N, 64, 64, 3) uint8 in torch."""
    # Antialiased: every raw pixel counts, so that a small ball does not vanish between two samples.
    frames = torch.from_numpy(frames[:, 0]).movedim(-1, 1)
    frames = F.interpolate(frames, (64, 64), mode="bilinear", antialias=True)
    return frames.movedim(1, -1).contiguous()


class Game:
    """Real games, one after another, across epochs and across restarts of the program."""

    # Game number n is seeded with seed + n, and the emulator has no other randomness. So the actions
    # alone determine everything that was seen: a checkpoint holds these (and the rewards, to compare),
    # no frames, and playing them again brings back every frame.
    def __init__(self, env_id, seed):
        self.env = make_env(env_id)
        self.seed = seed
        self.num_actions = int(self.env.single_action_space.n)
        self.begin(0)

    def begin(self, number):
        """Starts a game. `frame` is what the player sees; `opens` says that it opens an episode."""
        frames, _ = self.env.reset(seed=(self.seed + number) % 2**31)
        self.frame = resize(frames)[0]  # (64, 64, 3)
        self.opens = True
        self.number = number
        self.score = 0.0

    def step(self, action):
        """-> reward, end (running out of time is none), the game's score if it is over, else None."""
        frames, rewards, terminated, truncated, info = self.env.step(np.array([action]))
        reward = float(rewards[0])
        end = bool(terminated[0])
        self.opens = end or bool(truncated[0])
        over = False
        while terminated[0] or truncated[0]:
            # The next episode's first frame comes with the step after the end. It is a no-op:
            # - only a life was lost: the game goes on. What the no-op pays is credited to the action
            #   before. It may lose another life, hence the loop.
            # - the game is over: a new one begins, seen by the frame counter going back.
            played = info["episode_frame_number"][0]
            frames, rewards, terminated, truncated, info = self.env.step(np.array([0]))
            reward += float(rewards[0])
            over = bool(info["episode_frame_number"][0] < played)
        self.frame = resize(frames)[0]
        self.score += reward
        score = self.score if over else None
        if over:
            self.begin(self.number + 1)  # not the emulator's own new game, but one with our seed
        return reward, end, score


# ---- 3. Replay: every real step, and what the tokenizer makes of it ------------------------------
CHUNK = 256  # frames tokenized at once


class Replay:
    """All real steps, on the device: 100,000 are 1.2 GB of frames, and 2.5 of reconstructions (paper)."""

    # Step i is a frame, the action taken in it, the reward that followed, and whether a life
    # or the game ended. `tokens` and `reconstructions` are what the tokenizer makes of the frames,
    # computed once an epoch, since it is frozen while the other two learn. The world model reads the
    # tokens, and the policy sees the reconstructions, never the frames. Reconstructions from local
    # tokens (part 4) need not be kept: decoding them copies pixels.
    def __init__(self, args):
        n = args.collect_epochs * args.collect_steps + CHUNK  # the last chunk is tokenized whole
        precision = torch.bfloat16 if args.mixed_precision else torch.float32
        with torch.device(args.device):
            self.frames = torch.zeros(n, 64, 64, 3, dtype=torch.uint8)
            self.actions = torch.zeros(n, dtype=torch.long)
            self.rewards = torch.zeros(n)
            self.ends = torch.zeros(n, dtype=torch.long)
            self.starts = torch.zeros(n, dtype=torch.long)  # first steps of the episodes
            self.tokens = torch.zeros(n, args.tokens_per_frame, dtype=torch.long)
            self.reconstructions = torch.zeros(0 if args.local_tokens else n, 3, 64, 64, dtype=precision)
        self.size = self.episodes = 0

    def record(self, game, action):
        """Takes a step in the game and appends it -> the game's score if it is over, else None."""
        if game.opens:
            self.starts[self.episodes] = self.size
            self.episodes += 1
        self.frames[self.size] = game.frame
        self.actions[self.size] = action
        reward, end, score = game.step(action)
        self.rewards[self.size] = reward
        self.ends[self.size] = end
        self.size += 1
        return score

    def sample(self, batch, steps, drawn="first"):
        """Segments of T = `steps` steps -> index (B, T) into the arrays above, valid (B, T)."""
        # Episodes are drawn uniformly, not steps, so that ends come up more often; the running
        # episode is one of them. Then one of its steps s = 0, 1, ... is drawn, as the first of the
        # segment or as its last:
        #   "first", the world model:   s  s+1  s+2  -   -     padding if the episode ends too early
        #   "last", the policy:         -   -    0  ...  s     padding if it begins too late
        # Padding repeats the episode's edge. `valid` is false there, which keeps it out of the
        # losses and of the policy's memory.
        bounds = F.pad(self.starts[: self.episodes], (0, 1), value=self.size)  # (episodes + 1,)
        episode = torch.randint(self.episodes, (batch,), device=bounds.device)  # (B,)
        start = bounds[episode]
        length = bounds[episode + 1] - start
        s = (torch.rand(batch, device=bounds.device) * length).long().minimum(length - 1)
        first = s - (steps - 1) if drawn == "last" else s
        position = first[:, None] + torch.arange(steps, device=bounds.device)  # (B, T)
        valid = (position >= 0) & (position < length[:, None])
        position = position.clamp(min=0).minimum(length[:, None] - 1)
        return start[:, None] + position, valid

    @torch.no_grad()
    def seen(self, tokenizer, index):
        """Steps (...) -> the frames that the policy sees there, decoded (..., 3, 64, 64)."""
        if len(self.reconstructions) == 0:
            return tokenizer.decode(self.tokens[index].flatten(0, -2)).unflatten(0, index.shape)
        return self.reconstructions[index]


def to_network(frames):
    """Frames (..., 64, 64, 3) uint8 -> (..., 3, 64, 64) float in [-1, 1]."""
    return frames.movedim(-1, -3).contiguous().float() / 127.5 - 1


# ---- 4. Tokenizer: a frame is K words (section 2.1, appendix A.1) --------------------------------
class GroupNorm(nn.GroupNorm):
    """GroupNorm in the precision of its input; (N, C, h, w) -> the same."""

    def forward(self, x):
        # Autocast would make it float32 on a GPU, and copies between the two precisions cost time.
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-6)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip connection; (N, C, h, w) -> the same."""

    # The skip connection lets gradients through unchanged, so that many blocks can be stacked.
    def __init__(self, channels):
        super().__init__()
        self.norm1 = GroupNorm(32, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(32, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """Single-head self-attention between the h x w places; (N, C, h, w) -> the same."""

    # Convolutions look at neighbours. Two paddles at opposite edges meet here.
    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(32, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        # contiguous: a GPU's fused attention wants the channels side by side in memory
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # (N, h w, 3 C)
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # each (N, 1 head, h w, C)
        y = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))


def make_encoder(sizes, C, E):
    """Table 2: frames (N, 3, 64, 64) -> latents (N, E, K), through the resolutions 64 .. g."""
    layers = OrderedDict(conv_in=nn.Conv2d(3, C, 3, padding=1))
    for i, size in enumerate(sizes):
        for j in range(2):
            layers[f"down_{i}_block_{j}"] = ResBlock(C)
            if size in (8, 16):  # larger grids cost too much; the smallest has mid_attn_1
                layers[f"down_{i}_attn_{j}"] = SpatialAttention(C)
        if size > sizes[-1]:  # halve it; padded on the right and at the bottom only
            layers[f"down_{i}_pad"] = nn.ZeroPad2d((0, 1, 0, 1))
            layers[f"down_{i}_downsample"] = nn.Conv2d(C, C, 3, stride=2)
    layers.update(mid_block_1=ResBlock(C), mid_attn_1=SpatialAttention(C), mid_block_2=ResBlock(C))
    layers.update(norm_out=GroupNorm(32, C), silu=nn.SiLU())
    layers["conv_out"] = nn.Conv2d(C, E, 3, padding=1)
    layers["pre_quant_conv"] = nn.Conv2d(E, E, 1)
    layers["flatten"] = nn.Flatten(2)  # (N, E, g, g) -> (N, E, K), row by row
    return nn.Sequential(layers)


def make_decoder(sizes, C, E):
    """Latents (N, E, K) -> frames (N, 3, 64, 64): the encoder backwards, one more block per size."""
    layers = OrderedDict(unflatten=nn.Unflatten(2, (sizes[-1], sizes[-1])))  # (N, E, g, g)
    layers.update(post_quant_conv=nn.Conv2d(E, E, 1), conv_in=nn.Conv2d(E, C, 3, padding=1))
    layers.update(mid_block_1=ResBlock(C), mid_attn_1=SpatialAttention(C), mid_block_2=ResBlock(C))
    for i, size in reversed(list(enumerate(sizes))):
        for j in range(3):
            layers[f"up_{i}_block_{j}"] = ResBlock(C)
            if size in (8, 16):
                layers[f"up_{i}_attn_{j}"] = SpatialAttention(C)
        if size < 64:
            layers[f"up_{i}_double"] = nn.Upsample(scale_factor=2)  # nearest neighbour
            layers[f"up_{i}_upsample"] = nn.Conv2d(C, C, 3, padding=1)
    layers.update(norm_out=GroupNorm(32, C), silu=nn.SiLU())
    layers["conv_out"] = nn.Conv2d(C, 3, 3, padding=1)
    return nn.Sequential(layers)


class Tokenizer(nn.Module):
    """Discrete autoencoder: frames (N, 3, 64, 64) in [-1, 1] <-> tokens (N, K)."""

    def __init__(self, args):
        super().__init__()
        grid = math.isqrt(args.tokens_per_frame)
        self.reconstruction_loss = F.l1_loss if args.reconstruction_loss == "l1" else F.mse_loss
        if args.local_tokens:
            # The small preset's. If every token describes the whole screen, the codes are used up
            # by combinations of paddles and scores, and the ball is the first thing to go. Here a
            # token sees and draws one square: a latent is its pixels, a code is a little picture.
            # Encoder and decoder have no parameters: only the codes are learned.
            side = 64 // grid
            E = 3 * side * side
            self.encoder = nn.Unfold(side, stride=side)  # (N, 3, 64, 64) -> (N, E, K)
            self.decoder = nn.Fold(64, side, stride=side)  # and back
        else:  # the paper's: a VQGAN without its GAN, where every token sees the whole frame
            E = 512
            sizes = [size for size in (64, 32, 16, 8, 4) if size >= grid]
            self.encoder = make_encoder(sizes, 64, E)
            self.decoder = make_decoder(sizes, 64, E)
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
        return torch.cat([self.quantize(self.encoder(part)) for part in x.split(CHUNK)])

    def decode(self, tokens):
        """Tokens (N, K) -> frames (N, 3, 64, 64), clamped to [-1, 1], as the policy sees them."""
        frames = [self.decoder(self.embed(part)) for part in tokens.split(CHUNK)]
        return torch.cat(frames).clamp(-1, 1)

    def loss(self, x, perceptual=None):
        """Equation 1 on frames x (N, 3, 64, 64) in [-1, 1] -> loss, metrics; with LPIPS if given."""
        # |x - D(z_q)| + |sg(z) - z_q|^2 + |z - sg(z_q)|^2 + LPIPS(x, D(z_q)), each a mean; sg stops
        # the gradient.
        z = self.encoder(x)  # (N, E, K)
        z_q = self.embed(self.quantize(z))
        # argmin has no gradient, and without one the paper's encoder would learn nothing about the
        # picture. Straight through: the value is z_q, the gradient passes to z as if nothing were
        # rounded. (Local tokens have only codes to learn, from the codebook term.)
        x_hat = self.decoder(z + (z_q - z).detach())
        reconstruction = self.reconstruction_loss(x_hat.float(), x)
        codebook = F.mse_loss(z_q, z.detach())  # pulls codes to latents
        commitment = F.mse_loss(z, z_q.detach())  # and latents to codes
        loss = reconstruction + codebook + commitment
        if perceptual is not None:
            loss = loss + perceptual(x, x_hat).mean()
        return loss, dict(tokenizer_loss=loss, reconstruction=reconstruction, commitment=commitment)

    @torch.no_grad()
    def revive_codes(self, x):
        """For local tokens: codes that frames x (N, 3, 64, 64) do not use get another square."""
        latents = self.encoder(x).transpose(1, 2).flatten(0, 1)  # (N K, E)
        codes = self.codebook.weight
        distance, tokens = torch.cdist(latents, codes).square().min(dim=1)  # each (N K,)
        unused = (tokens.bincount(minlength=len(codes)) == 0).nonzero().flatten()
        # Most squares are background, which has its code. So an unused code gets the pixels of a
        # square picked with probability proportional to its squared distance from the nearest code,
        # new ones included (k-means++), so of something not drawn yet. Sixteen at a time, for speed.
        # A distance below 0.01 is rounding: that square has its code already. (1e-9: multinomial
        # wants as many positive weights as it picks.)
        for i in range(0, len(unused), 16):
            part = unused[i : i + 16]
            picked = torch.multinomial(distance + 1e-9, len(part))
            new = distance[picked] > 0.01
            codes[part[new]] = latents[picked[new]]
            gap = torch.cdist(latents, codes[part]).square().min(dim=1).values
            distance = distance.minimum(gap)


VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
HEADS_NAME = "lpips_vgg-a78928a0.pth"  # in torch hub's cache; downloads must have this hash
VGG_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers


def lpips(weights, x, y):
    """How differently a VGG16 sees images x, y (N, 3, h, w) in [-1, 1] -> (N,); Zhang et al. 2018."""
    distance = 0
    # In float32: bfloat16 distorts the gradient where x and y are close.
    with torch.autocast(x.device.type, enabled=False):
        x = (x.float() - weights["shift"]) / weights["scale"]
        y = (y.float() - weights["shift"]) / weights["scale"]
        for stage, convolutions in enumerate(VGG_STAGES):
            for i in convolutions:
                kernel, bias = weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]
                x = F.relu(F.conv2d(x, kernel, bias, padding=1))
                y = F.relu(F.conv2d(y, kernel, bias, padding=1))
            difference = (F.normalize(x, eps=1e-10) - F.normalize(y, eps=1e-10)).square()
            head = weights[f"lin{stage}.model.1.weight"]  # how much each channel matters to people
            distance = distance + F.conv2d(difference, head).mean((1, 2, 3))
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
    return distance


def load_lpips(device):
    """-> lpips(x, y) with its published weights, from torch hub's cache or the net, else InputError."""
    socket.setdefaulttimeout(30)  # seconds: a network that never answers must not hang the run
    # weights_only: code that a file may contain is never run.
    options = dict(map_location="cpu", weights_only=True, check_hash=True)
    try:
        vgg = torch.hub.load_state_dict_from_url(VGG_URL, **options)
        heads = torch.hub.load_state_dict_from_url(HEADS_URL, file_name=HEADS_NAME, **options)
        weights = {name: x.to(device) for name, x in (vgg | heads).items() if "classifier" not in name}
        weights["shift"] = torch.tensor([-0.030, -0.088, -0.188], device=device).view(3, 1, 1)
        weights["scale"] = torch.tensor([0.458, 0.448, 0.450], device=device).view(3, 1, 1)
        return partial(lpips, weights)
    except Exception as error:  # no network, a wrong hash, a damaged file
        raise InputError(
            f"no weights for LPIPS ({error!r:.100}): put {VGG_URL} and {HEADS_URL} (as {HEADS_NAME})"
            f" into {torch.hub.get_dir()}/checkpoints, or do without: --no-perceptual-loss"
        ) from None


# ---- 5. World model: Atari as a language (a GPT; section 2.2, appendix A.2) ----------------------
# Step i has 16 frame tokens, zi0 to zif (hex digits), then its action ai. What is predicted:
#   position     0    1  ...   14   15     16  |  17   18  ...   31   32     33  |  34
#   input       z00  z01 ...  z0e  z0f     a0  |  z10  z11 ...  z1e  z1f     a1  |  z20 ...
#   next token  z01  z02 ...  z0f    -    z10  |  z11  z12 ...  z1f    -    z20  |  z21 ...
#   reward, end                         r0, e0 |                          r1, e1 |
# z0f predicts no token: an action follows it, and the policy chooses that. A token sees everything
# to its left.
class Block(nn.Module):
    """Pre-norm transformer block: (B, S, D) -> the same."""

    def __init__(self, width, dropout):
        super().__init__()
        self.heads = 4
        self.dropout = dropout
        self.ln1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, cache=None, start=0):
        """x: positions 0 .. S - 1 (start = 0), or the one position `start`, which sees the earlier
        ones in the cache (2, B, nh, all positions, hs). Either way keys and values go into the cache."""
        S = x.shape[1]
        qkv = self.qkv(self.ln1(x)).unflatten(2, (3, self.heads, -1))  # (B, S, 3, nh, hs)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, nh, S, hs)
        q, k, v = qkv
        if cache is not None:
            cache[:, :, :, start : start + S] = qkv[1:]
            k, v = cache[:, :, :, : start + S]  # each (B, nh, start + S, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=(S > 1))
        y = self.proj(y.transpose(1, 2).flatten(2))  # (B, S, D)
        x = x + F.dropout(y, dropout)
        return x + F.dropout(self.mlp(self.ln2(x)), dropout)


class WorldModel(nn.Module):
    """GPT over frame tokens and actions, with heads for next token, reward and end."""

    def __init__(self, args, num_actions):
        super().__init__()
        D, K, V = args.width, args.tokens_per_frame, args.vocab_size
        self.tokens_per_frame = K
        # The paper's GPT learns its own embeddings, and never sees the tokenizer's codes.
        self.token_embedding = nn.Embedding(V, D)
        self.action_embedding = nn.Embedding(num_actions, D)
        self.pos_emb = nn.Embedding(args.sequence_length * (K + 1), D)
        self.local_tokens = args.local_tokens
        if args.local_tokens:
            # A local token's code is a small picture, and is embedded by its pixels as well: what is
            # learned about one token carries over to all that look like it. Rare rewards need that.
            pixels = 3 * 64 * 64 // K
            self.project_pixels = nn.Linear(pixels, D, bias=False)
            self.register_buffer("code_pixels", torch.zeros(V, pixels))
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(D, args.dropout) for _ in range(args.layers))
        self.ln_f = nn.LayerNorm(D)
        # Three questions about one hidden state, each answered by a small network.
        rewards = 3 if args.reward_loss == "cross-entropy" else 1  # classes: the signs -1, 0, 1
        heads = [nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, n)) for n in (V, rewards, 2)]
        self.head_token, self.head_reward, self.head_end = heads
        # GPT's deviation of 0.02 makes a narrow network's first outputs tiny. The small preset has no
        # time for that: with 0.08, and the positions below, it learns several times as fast.
        std = 0.08 if args.preset == "small" else 0.02
        for name, parameter in self.named_parameters():
            if "ln" not in name:  # LayerNorms begin as the identity
                nn.init.normal_(parameter, 0.0, std)
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        if args.preset == "small":
            # A position begins as step + place in the step, so that what is learned at one step
            # applies at all of them.
            steps = std * torch.randn(args.sequence_length, 1, D)
            places = std * torch.randn(K + 1, D)
            self.pos_emb.weight.data.copy_((steps + places).flatten(0, 1))

    @torch.no_grad()
    def take_codes(self, codes):
        """For local tokens: takes the pixels of the tokenizer's codes (V, E), centred and scaled."""
        codes = codes - codes.mean(0)
        self.code_pixels.copy_(codes / codes.square().sum(1).mean().sqrt())

    def token_vectors(self):
        """-> the embeddings of the whole vocabulary (V, D)."""
        if self.local_tokens:
            return self.token_embedding.weight + self.project_pixels(self.code_pixels)
        return self.token_embedding.weight

    def embed(self, tokens, actions):
        """Tokens (B, T, K), actions (B, T) -> (B, S, D): a step's frame tokens, then its action."""
        tokens = F.embedding(tokens, self.token_vectors())  # (B, T, K, D)
        actions = self.action_embedding(actions)[:, :, None]  # (B, T, 1, D)
        return torch.cat([tokens, actions], dim=2).flatten(1, 2)

    def forward(self, x, caches=None, start=0):
        """Embedded positions start .. start + S - 1 (B, S, D) -> hidden states (B, S, D)."""
        x = self.dropout(x + self.pos_emb.weight[start : start + x.shape[1]])
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], start)
        return self.ln_f(x)

    def predict(self, tokens, actions):
        """Segments -> logits of tokens (B, T K, V), rewards (B, T, 3 or 1), ends (B, T, 2)."""
        K = self.tokens_per_frame
        h = self(self.embed(tokens, actions)).unflatten(1, (-1, K + 1))  # (B, T, K + 1, D)
        at_action = h[:, :, K]
        # All positions but the last frame token's (table above). Of those left, number i predicts the
        # segment's frame token i + 1, both counted from 0: a0 is number 15, and z10 is token 16.
        predicting = torch.cat([h[:, :, : K - 1], h[:, :, K:]], dim=2)
        logits = self.head_token(predicting).flatten(1, 2)
        return logits.float(), self.head_reward(at_action).float(), self.head_end(at_action).float()

    def expected_reward(self, logits):
        """Reward logits (..., 3 or 1) -> the mean of the sign (...)."""
        if logits.shape[-1] == 1:
            return logits[..., 0]
        chances = logits.softmax(-1)
        return chances[..., 2] - chances[..., 0]

    def loss(self, tokens, actions, rewards, ends, valid):
        """Segments (B, T, ...) -> loss, metrics; the sum of three means over what is valid."""
        token_logits, reward_logits, end_logits = self.predict(tokens, actions)
        # The very first token is given; the last action predicts a frame that is not in the segment.
        # cross_entropy skips targets of -100.
        targets = tokens.masked_fill(~valid[..., None], -100).flatten(1)[:, 1:]  # (B, T K - 1)
        token_loss = F.cross_entropy(token_logits[:, :-1].flatten(0, 1), targets.flatten())
        # Signs, since games pay in ones or in thousands, and one learning rate should suit all.
        signs = rewards.sign()  # (B, T)
        if reward_logits.shape[-1] == 3:
            classes = (signs.long() + 1).masked_fill(~valid, -100)
            reward_loss = F.cross_entropy(reward_logits.flatten(0, 1), classes.flatten())
        else:
            errors = (reward_logits[..., 0] - signs).square()
            reward_loss = (errors * valid).sum() / valid.sum()
        ends = ends.masked_fill(~valid, -100)
        end_loss = F.cross_entropy(end_logits.flatten(0, 1), ends.flatten())
        metrics = dict(token_loss=token_loss, reward_loss=reward_loss, end_loss=end_loss)
        return token_loss + reward_loss + end_loss, metrics


# ---- 6. Actor-critic: learns in dreams, plays for real (section 2.3, appendices A.3 and B) -------
class ActorCritic(nn.Module):
    """CNN and LSTM with a policy and a value head. Its memory, `state`, is (B, 2, L): h and c."""

    def __init__(self, args, num_actions):
        super().__init__()
        size = args.policy_size
        layers = [nn.AvgPool2d(64 // size)]
        if args.preset == "small":
            # Two frames of a game differ in a few pixels: what they share drowns what moves. So a
            # pixel is seen as its difference from its mean, in its own standard deviations, at most 5
            # of them. eps = 0.05^2 keeps pixels that hardly ever change from being blown up.
            whiten = nn.BatchNorm1d(3 * size * size, eps=0.0025, momentum=1.0, affine=False)
            layers += [nn.Flatten(), whiten, nn.Unflatten(1, (3, size, size)), nn.Hardtanh(-5, 5)]
        for channels, width in ((3, 32), (32, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
        self.cnn = nn.Sequential(*layers, nn.Flatten())  # (N, 3, 64, 64) -> (N, 1024), or fewer
        # One frame shows no velocities: the memory has to know where the ball came from.
        self.lstm = nn.LSTMCell(64 * (args.policy_size // 16) ** 2, args.lstm_size)
        self.actor = nn.Linear(args.lstm_size, num_actions)
        self.critic = nn.Linear(args.lstm_size, 1)
        if args.preset == "small":
            # torch's own weights shrink the differences between frames to a few percent. With them the
            # policy learned nothing from 41,000 real frames of KungFuMaster; with these it scored
            # up to three times as much as random play.
            for name, parameter in self.cnn.named_parameters():
                if name.endswith("weight"):
                    nn.init.orthogonal_(parameter, math.sqrt(2))
            nn.init.orthogonal_(self.lstm.weight_ih)
        self.cnn.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    @torch.no_grad()
    def adapt(self, frames):
        """For the small preset: measures means and deviations of decoded frames (N, 3, 64, 64)."""
        # self.cnn is [pool, flatten, whiten, ...]; in train mode whiten measures anew.
        whiten = self.cnn[2].train()
        whiten(self.cnn[:2](frames.float()))
        whiten.eval()

    def initial_state(self, batch):
        """An empty memory of `batch` players, (batch, 2, L)."""
        return self.actor.weight.new_zeros(batch, 2, self.lstm.hidden_size)

    def forward(self, frames, state, valid=None):
        """Decoded frames (B, T, 3, 64, 64), memory before them -> logits (B, T, A), values (B, T),
        memory after them. Where `valid` (B, T) is false, on padding, the memory stays empty."""
        features = self.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])  # (B, T, features)
        h, c = state.unbind(1)
        hidden = []
        with torch.autocast(frames.device.type, enabled=False):  # bfloat16's 8 bits are too few
            for t in range(frames.shape[1]):
                h, c = self.lstm(features[:, t].float(), (h, c))
                if valid is not None:
                    h = h * valid[:, t, None]
                    c = c * valid[:, t, None]
                hidden.append(h)
            hidden = torch.stack(hidden, dim=1)  # (B, T, L)
            logits = self.actor(hidden)
            values = self.critic(hidden)[..., 0]
            return logits, values, torch.stack([h, c], dim=1)

    def loss(self, dreamt, args):
        """A dream, as `imagine` returns it -> loss, metrics; appendix B."""
        # The dream was played without gradient; this pass over its frames has it. With one update
        # per batch, the actions are this policy's own. The small preset makes four and ignores that
        # the policy has moved a little since: there is no importance ratio.
        logits, values, _ = self(dreamt["frames"], dreamt["state"])  # (B, H, A), (B, H)
        rewards, ends = dreamt["rewards"], dreamt["ends"]  # (B, H - 1)
        returns = lambda_returns(rewards, values.detach(), ends, args.gamma, args.td_lambda)
        alive = (ends.cumsum(1) - ends == 0).float()  # up to the first end: the rest is in no loss
        weight = alive / alive.sum()
        log_policy = logits[:, :-1].log_softmax(-1)  # the last frame has a value, no action
        log_chosen = log_policy.gather(-1, dreamt["actions"][..., None])[..., 0]  # (B, H - 1)
        advantage = returns - values[:, :-1]
        # The critic learns the returns of this policy. The policy learns from their excess over the
        # value: REINFORCE with a baseline.
        value_loss = (weight * advantage.square()).sum()
        gain = advantage.detach()
        if args.norm_advantage:
            # Divided by their root mean square, the root of the value loss, so that entropy weighs
            # the same where rewards are many and where they are few. The 0.01 keeps noise small
            # where there are no rewards.
            gain = gain / (value_loss.detach().sqrt() + 0.01)
        policy_loss = -(weight * log_chosen * gain).sum()
        # Entropy keeps the policy from settling on an action before it has tried the others.
        entropy = -(weight[..., None] * log_policy.exp() * log_policy).sum()
        loss = policy_loss + value_loss - args.entropy_coef * entropy
        variance = (weight * (returns - (weight * returns).sum()).square()).sum()
        metrics = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
        metrics["explained_variance"] = 1 - value_loss / (variance + 1e-8)
        metrics["dream_return"] = (rewards * alive).sum(1).mean()
        return loss, metrics


def lambda_returns(rewards, values, ends, gamma, lambda_):
    """Appendix B: rewards and ends (B, H - 1), values (B, H) -> returns (B, H - 1)."""
    # G_t = r_t + gamma (1 - end_t) ((1 - lambda) V_{t+1} + lambda G_{t+1}), from the back;
    # after the last reward comes the last value.
    returns = torch.empty_like(rewards)
    following = values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        mixed = (1 - lambda_) * values[:, t + 1] + lambda_ * following
        following = rewards[:, t] + gamma * (1 - ends[:, t]) * mixed
        returns[:, t] = following
    return returns


# ---- 7. Imagination: the world model as a game ---------------------------------------------------
class Agent(nn.Module):
    """The three networks, the learning copy of the world model, and how they act on real frames."""

    def __init__(self, args, num_actions):
        super().__init__()
        self.tokenizer = Tokenizer(args)
        self.world_model = WorldModel(args, num_actions)
        # The optimizer changes the copy. `world_model`, which dreams, is the copy's moving average.
        self.learner = copy.deepcopy(self.world_model)
        self.actor_critic = ActorCritic(args, num_actions)
        self.draw_rewards = args.draw_rewards

    def act(self, frames, state, temperature):
        """Real frames (N, 64, 64, 3), memory, temperature -> actions (N,), memory."""
        # The policy learned from decoded frames, so real frames go through the tokenizer for it. The
        # temperature is a tensor, since a CUDA graph would freeze a number.
        seen = self.tokenizer.decode(self.tokenizer.encode(to_network(frames)))
        logits, _, state = self.actor_critic(seen[:, None], state)
        return sample(logits[:, 0] / temperature.clamp(min=1e-3)), state


def sample(logits):
    """Logits (..., n) -> classes (...), by inverting the cumulative distribution."""
    # torch.multinomial would make the CPU wait for a GPU at each of a dream's thousands of draws.
    cumulative = logits.float().softmax(-1).cumsum(-1)
    u = torch.rand(logits.shape[:-1], device=logits.device) * cumulative[..., -1]
    return (cumulative[..., :-1] <= u[..., None]).sum(-1)  # how many classes u has passed


@torch.no_grad()  # no graph is kept: `loss` runs the policy again where it needs the gradient
def imagine(agent, steps, past_frames, valid, past_tokens, past_actions, given=None):
    """Dreams `steps` = H - 1 steps after a real past -> dict of frames (B, H, 3, 64, 64), tokens
    (B, H, K), both beginning with the last real frame; actions, rewards, ends (B, H - 1); state
    (B, 2, L), the policy's memory just before that last real frame."""
    # The policy reads the past as m decoded frames (B, m, 3, 64, 64); valid (B, m) is false on
    # padding. The world model reads its last n steps as past_tokens (B, n, K) and past_actions (B, n).
    # In training m = --burn-in + 1 and n = --context.
    #                  earlier real frames         last real frame     H - 1 dreamt frames
    #    policy        fill its memory             acts on it          acts on all but the last
    #    world model   reads the last n - 1        reads it            generates them
    # The last of past_actions is ignored: the policy chooses a new one, or `given` (B, H - 1) does.
    world_model = agent.world_model
    state = agent.actor_critic.initial_state(len(past_frames))
    if past_frames.shape[1] > 1:
        _, _, state = agent.actor_critic(past_frames[:, :-1], state, valid[:, :-1])
    frame = past_frames[:, -1]
    lists = dict(frames=[frame], tokens=[past_tokens[:, -1]], actions=[], rewards=[], ends=[])
    state_before = state
    # Keys and values of the past are cached, so that a new position costs one position, not all.
    embedded = world_model.embed(past_tokens, past_actions)[:, :-1]  # all but the last action
    vectors = world_model.token_vectors()  # (V, D)
    positions, D = world_model.pos_emb.weight.shape
    block = world_model.blocks[0]
    shape = (len(world_model.blocks), 2, len(frame), block.heads, positions, D // block.heads)
    dtype = block.qkv(embedded[:, 0]).dtype  # bfloat16 under autocast
    caches = torch.zeros(shape, dtype=dtype, device=frame.device)
    world_model(embedded, caches)  # fills them; what it predicts is known already
    position = embedded.shape[1]
    for t in range(steps):
        logits, _, state = agent.actor_critic(frame[:, None], state)
        action = sample(logits[:, 0]) if given is None else given[:, t]
        vector = world_model.action_embedding(action)
        h = world_model(vector[:, None], caches, position)[:, 0]  # (B, D)
        reward = world_model.head_reward(h).float()  # (B, 3): logits of the signs; or (B, 1): mse
        # The authors sample the sign. Its mean gives the same gradient on average, with less noise.
        if agent.draw_rewards and reward.shape[1] == 3:
            reward = sample(reward) - 1.0  # (B,)
        else:
            reward = world_model.expected_reward(reward)
        end = sample(world_model.head_end(h)).float()  # the loss leaves out what follows an end
        frame_tokens = []
        for k in range(world_model.tokens_per_frame):
            # The action's position predicts the first token, each token the next one. The last
            # token's prediction is not used: an action follows it.
            frame_tokens.append(sample(world_model.head_token(h)))
            vector = vectors[frame_tokens[k]]
            h = world_model(vector[:, None], caches, position + k + 1)[:, 0]
        position += world_model.tokens_per_frame + 1
        frame_tokens = torch.stack(frame_tokens, dim=1)  # (B, K)
        frame = agent.tokenizer.decode(frame_tokens)
        step = dict(frames=frame, tokens=frame_tokens, actions=action, rewards=reward, ends=end)
        for name, value in step.items():
            lists[name].append(value)
    dreamt = {name: torch.stack(values, dim=1) for name, values in lists.items()}
    return dict(dreamt, state=state_before)


def accelerate(function, args):
    """Wraps a function of tensors: no gradient, mixed precision, on a GPU a graph for each shape."""

    # A dream is tens of thousands of tiny kernels, each quicker to run than to launch. A CUDA graph
    # records them once and replays them in one go; a call overwrites the outputs of the one before.
    def run(*inputs):
        # Autocast inside, so that a graph casts the weights anew: a cast made before it would be of
        # weights that have changed since.
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, args.mixed_precision):
            return function(*inputs)

    graphs = {}

    def run_graph(*inputs):
        shapes = tuple(x.shape for x in inputs)
        if shapes not in graphs:
            # Recording draws random numbers too. A resumed run records later than one never stopped,
            # but must draw the same ones.
            with torch.random.fork_rng([torch.cuda.current_device()]):
                static = tuple(x.clone() for x in inputs)  # later inputs are copied into these
                graphs[shapes] = torch.cuda.make_graphed_callables(run, static)
        return graphs[shapes](*inputs)

    return run_graph if args.device == "cuda" else run


# ---- 8. Training: collect, then train the three networks, epoch after epoch ----------------------
SHOWN = "real_steps, train_return, tokenizer_loss, token_loss, dream_return, entropy, eval_return".split(", ")


def progress(count, label):
    """range(count), with a line on the terminal that shows progress and time left."""
    begun = time.time()
    for i in range(count):
        yield i
        if sys.stderr.isatty():
            left = (time.time() - begun) * (count / (i + 1) - 1)
            line = f"{label} {i + 1}/{count}, {left:.0f} s left"
            print(f"\r{line:60}\r", end="", file=sys.stderr, flush=True)


def update(name, network, optimizer, args, *inputs):
    """A step on network.loss(*inputs), the gradient's norm clipped to 10 (appendix A) -> metrics."""
    with torch.autocast(args.device, torch.bfloat16, args.mixed_precision):
        loss, metrics = network.loss(*inputs)
    loss.backward()
    metrics[f"{name}_gradient"] = nn.utils.clip_grad_norm_(network.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def means(history):
    """A list of metrics, each a dict of tensors -> their means, as floats."""
    # Once per phase: to read a value is to wait for the GPU, which then stands idle.
    return {name: torch.stack([metrics[name] for metrics in history]).mean().item() for name in history[0]}


def collect(agent, act, game, replay, args):
    """Real steps, into the replay -> metrics."""
    temperature = torch.tensor(args.temperature, device=args.device)
    state = agent.actor_critic.initial_state(1)
    if not game.opens:  # the policy has changed: it watches the last frames of the episode again
        start = max(int(replay.starts[replay.episodes - 1]), replay.size - args.burn_in)
        for frame in replay.frames[start : replay.size]:
            _, state = act(frame[None], state, temperature)
    scores = []
    for _ in progress(args.collect_steps, "collect"):
        if game.opens:
            state = agent.actor_critic.initial_state(1)
        # Actions are sampled: exploration comes from the policy's entropy and a few random actions.
        action, state = act(game.frame[None].to(args.device), state, temperature)
        if torch.rand(1) < args.epsilon:
            action = torch.randint(game.num_actions, (1,))
        score = replay.record(game, int(action))
        # A game's score counts all lives; an episode of the replay is one life.
        if score is not None:
            scores.append(score)
    return dict(train_return=float(np.mean(scores))) if scores else {}


def train_tokenizer(agent, optimizer, replay, args, perceptual):
    """An epoch's updates on single frames -> metrics."""
    if args.local_tokens:  # real squares as codes are better than hundreds of updates
        some = torch.randperm(replay.size)[:4096]
        agent.tokenizer.revive_codes(to_network(replay.frames[some]))
    history = []
    for _ in progress(args.tokenizer_updates, "tokenizer"):
        index, _ = replay.sample(args.tokenizer_batch, 1)
        x = to_network(replay.frames[index[:, 0]])  # (B, 3, 64, 64)
        history.append(update("tokenizer", agent.tokenizer, optimizer, args, x, perceptual))
    return means(history)


@torch.no_grad()
def tokenize_replay(agent, replay, args):
    """Caches what the next two phases need of the tokenizer, frozen meanwhile -> metrics."""
    # Whole chunks, even the last: for each new shape cuDNN would look for the fastest kernels.
    for i in progress(math.ceil(replay.size / CHUNK), "tokens"):
        part = slice(i * CHUNK, (i + 1) * CHUNK)
        with torch.autocast(args.device, torch.bfloat16, args.mixed_precision):
            replay.tokens[part] = agent.tokenizer.encode(to_network(replay.frames[part]))
            if not args.local_tokens:
                replay.reconstructions[part] = agent.tokenizer.decode(replay.tokens[part])
    if args.local_tokens:
        agent.world_model.take_codes(agent.tokenizer.codebook.weight)
        agent.learner.take_codes(agent.tokenizer.codebook.weight)
    return dict(codes_in_use=len(replay.tokens[: replay.size].unique()))


def train_world_model(agent, optimizer, replay, args):
    """An epoch's updates on segments of T real steps -> metrics."""
    agent.learner.train()  # dropout is on; `world_model` stays without it
    history = []
    for _ in progress(args.world_model_updates, "world model"):
        # Segments begin anywhere, so that every position sees every kind of frame.
        index, valid = replay.sample(args.world_model_batch, args.sequence_length)
        segments = [x[index] for x in (replay.tokens, replay.actions, replay.rewards, replay.ends)]
        history.append(update("world_model", agent.learner, optimizer, args, *segments, valid))
        # With the small preset's learning rate the weights never come to rest. Their exponential
        # moving average does. The paper has none: with a decay of 0 the two are the same.
        with torch.no_grad():
            for mean, weight in zip(agent.world_model.parameters(), agent.learner.parameters()):
                mean.lerp_(weight, 1 - args.ema_decay)
    return means(history)


def train_actor_critic(agent, optimizer, replay, args, dreamer):
    """An epoch's updates in dreams -> metrics. dreamer: `imagine`, accelerated."""
    if args.preset == "small":
        some = torch.randperm(replay.size)[:2048]
        agent.actor_critic.adapt(replay.seen(agent.tokenizer, some))
    order = torch.arange(args.actor_critic_batch, device=args.device)
    history = []
    for _ in progress(args.actor_critic_updates, "actor-critic"):
        # Dreams begin all over the replay: the policy practises wherever it has ever been.
        index, valid = replay.sample(args.actor_critic_batch, args.burn_in + 1, "last")
        # The world model's context. Where the episode is shorter, its first step repeats.
        last = index[:, -args.context :]
        seen = replay.seen(agent.tokenizer, index)
        dreamt = dreamer(seen, valid, replay.tokens[last], replay.actions[last])
        # The small preset makes several updates per batch, because it can afford few dreams.
        for part in order.split(args.actor_critic_minibatch):
            minibatch = {name: x[part] for name, x in dreamt.items()}
            history.append(update("actor_critic", agent.actor_critic, optimizer, args, minibatch, args))
    return means(history)


def make_optimizers(agent, args):
    """-> dict of optimizers: AdamW for the transformer, Adam for the others; appendix A."""
    # Weight decay applies to the transformer's matrices only. Embeddings, gains and biases must keep
    # their size: a rare word would otherwise fade between two uses.
    parameters = dict(agent.learner.named_parameters())
    decayed = [p for name, p in parameters.items() if p.dim() == 2 and "emb" not in name]
    others = [p for name, p in parameters.items() if p.dim() == 1 or "emb" in name]
    groups = [dict(params=decayed, weight_decay=0.01), dict(params=others, weight_decay=0.0)]
    adam, adamw = torch.optim.Adam, torch.optim.AdamW
    return dict(  # fused: one kernel updates all parameters on a GPU
        tokenizer=adam(agent.tokenizer.parameters(), args.tokenizer_lr, fused=True),
        world_model=adamw(groups, args.world_model_lr, fused=True),
        actor_critic=adam(agent.actor_critic.parameters(), args.actor_critic_lr, fused=True),
    )


def train(args, folder):
    """The whole run: the phases of every epoch, a checkpoint after each, evaluations."""
    torch.manual_seed(args.seed)
    game = Game(args.env, args.seed * 100_000)
    agent = Agent(args, game.num_actions).to(args.device).eval()
    optimizers = make_optimizers(agent, args)
    replay = Replay(args)
    perceptual = load_lpips(args.device) if args.perceptual_loss else None
    history = []  # one row of metrics per epoch
    if args.resume:
        history = load_run(folder, agent, optimizers, game, replay)
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # imported here, since few runs need it

        board = SummaryWriter(folder)
    save_run(folder, args, history, agent, optimizers, replay)  # even epoch 1 can be resumed
    act = accelerate(agent.act, args)
    dreamer = accelerate(partial(imagine, agent, args.horizon - 1), args)
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in agent.named_children()}
    print(f"{folder}: {args.preset} preset on {args.device}, parameters {sizes}", flush=True)

    for epoch in range(len(history) + 1, args.epochs + 1):
        # Every epoch has a seed of its own, so that a resumed run needs no generator's state.
        torch.manual_seed(args.seed * 100_000 + epoch)
        begun = time.time()
        row = dict(epoch=epoch)
        # Each network needs what the one before has learned, so they start one after the other:
        # first there must be words, then a language, then dreams worth learning from.
        if epoch <= args.collect_epochs:
            row |= collect(agent, act, game, replay, args)
        if epoch >= args.tokenizer_start:
            row |= train_tokenizer(agent, optimizers["tokenizer"], replay, args, perceptual)
        # The world model learns the words of this epoch's tokenizer, frozen until the next epoch.
        if epoch >= args.world_model_start:
            row |= tokenize_replay(agent, replay, args)
            row |= train_world_model(agent, optimizers["world_model"], replay, args)
        # The policy learns in dreams only. Real frames do no more than begin them.
        if epoch >= args.actor_critic_start:
            row |= train_actor_critic(agent, optimizers["actor_critic"], replay, args, dreamer)
        # A loss that is not finite has already spoilt the weights: stop before they are saved.
        for name, value in row.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} in epoch {epoch} is {value}; {folder} still holds the previous epoch")
        # No training below this line: it measures, keeps and shows.
        if epoch % args.eval_every == 0:
            result, recording = evaluate(agent, act, args, args.eval_games)
            write_pictures(agent, args, recording, folder / "media" / f"epoch_{epoch:03d}")
            row |= dict(eval_return=result["mean"], **result["health"])
        row |= dict(real_steps=replay.size, seconds=time.time() - begun)
        if args.tensorboard:
            for name, value in row.items():
                board.add_scalar(name, value, epoch)
        history.append(row)
        save_run(folder, args, history, agent, optimizers, replay)
        shown = ", ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row)
        left = (args.epochs - epoch) * row["seconds"] / 60
        print(f"epoch {epoch}/{args.epochs}: {shown}, {left:.0f} min left at this pace", flush=True)
    result, recording = evaluate(agent, act, args, args.final_games)
    write_pictures(agent, args, recording, folder / "media" / "final")
    write_atomically(folder / "eval.json", json.dumps(result, indent=1).encode())
    print(summary(result))


# ---- 9. Evaluation: whole real games, and how healthy each network is ----------------------------
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


def play_games(agent, act, args, games, max_steps=math.inf):
    """Plays whole games side by side -> returns (games,), and frames, actions, rewards of the first
    game's first 1000 steps. max_steps: stop playing when that many are recorded."""
    # All games start at once, and we wait for the longest: to take the first n that finish would
    # favour short games, usually lost ones.
    env = make_env(args.env, games, training=False)
    # Not training's seeds. Without no-ops Atari does not use them: games differ by the actions drawn.
    first_seed = args.seed * 100_000 + 50_000
    frames, _ = env.reset(seed=(first_seed + np.arange(games)) % 2**31)
    torch.manual_seed(args.seed)  # evaluations can be repeated
    temperature = torch.tensor(args.eval_temperature, device=args.device)
    state = agent.actor_critic.initial_state(games)
    returns = np.zeros(games)
    playing = np.ones(games, dtype=bool)
    recording = []
    while playing.any() and len(recording) < max_steps:
        resized = resize(frames)
        # The policy's memory begins empty and lasts for the whole game, across lives.
        actions, state = act(resized.to(args.device), state, temperature)
        actions = actions.cpu()
        frames, rewards, terminated, truncated, _ = env.step(actions.numpy())
        returns += rewards * playing  # a game that is over waits for the others
        if playing[0] and len(recording) < 1000:  # enough for pictures and metrics
            # a copy: a view would keep the frames of all games
            recording.append((resized[0].clone(), actions[0], torch.tensor(float(rewards[0]))))
        playing &= ~(terminated | truncated)
    return returns, [torch.stack(column).to(args.device) for column in zip(*recording)]


@torch.no_grad()
def health(agent, recording, T):
    """The networks on real play that they were not trained on, in segments of T steps -> metrics."""
    count = len(recording[0]) // T  # what is left at the end of the game is not used
    frames, actions, rewards = (x[: count * T] for x in recording)
    x = to_network(frames)
    tokens = agent.tokenizer.encode(x)  # (count T, K)
    # What moves is a small part of a frame: a good mean error can hide that it is all missing.
    error = (agent.tokenizer.decode(tokens) - x).abs()
    contrast = (x - x.median(dim=0).values).abs()  # the error if only the background were drawn
    moving = (contrast > 0.2).float()
    lost = (moving * error).sum() / (moving * contrast).sum().clamp(min=1)
    metrics = dict(moving_contrast_kept=1 - lost)
    # The least a world model must beat: "each token stays what it was a frame ago". It has an easier
    # task, since it is given all real tokens before the one it predicts, even those of the same frame.
    tokens = tokens.unflatten(0, (count, T))
    logits, reward, _ = agent.world_model.predict(tokens, actions.unflatten(0, (count, T)))
    # Prediction i is about token i + 1 (see predict), so that K - 1 is the first about frame 1.
    expected = logits[:, tokens.shape[2] - 1 : -1].argmax(-1)
    metrics["token_accuracy"] = (expected == tokens[:, 1:].flatten(1)).float().mean()
    metrics["copy_accuracy"] = (tokens[:, :-1] == tokens[:, 1:]).float().mean()
    # Rewards are rare: a model that never predicts one has a low loss, but teaches nothing.
    expected = agent.world_model.expected_reward(reward).flatten().round()
    paid = rewards != 0
    found = paid & (expected == rewards.sign())
    metrics["rewards_paid"] = paid.sum()
    if paid.any():
        metrics["reward_recall"] = found.sum() / paid.sum()
    return {name: float(value) for name, value in metrics.items()}


def evaluate(agent, act, args, games):
    """Whole games -> a result, for eval.json, and what the first game showed."""
    returns, recording = play_games(agent, act, args, games)
    result = dict(game=args.game, seed=args.seed, temperature=args.eval_temperature)
    result["mean"] = float(returns.mean())
    if games > 1:  # half of the 95 % interval of the mean
        result["interval"] = float(1.96 * returns.std() / math.sqrt(games - 1))
    result["returns"] = returns.tolist()
    result["health"] = health(agent, recording, min(args.sequence_length, len(recording[0])))
    return result, recording


def summary(result):
    """A result -> one line, with reference scores where they are known."""
    game, mean = result["game"], result["mean"]
    interval = f" +- {result['interval']:.1f} (95 %)" if "interval" in result else ""
    line = f"{game}: {mean:.1f}{interval}, {len(result['returns'])} games"
    found = re.search(rf"\b{game} (\S+) (\S+) (\S+)", SCORES)
    if found:  # games become comparable on a scale where 0 is random play and 1 a human
        random, human, iris = (float(score) for score in found.groups())
        normalised = (mean - random) / (human - random)
        line += f"; random {random}, human {human}, IRIS {iris}; normalised {normalised:.3f}"
    return line


# ---- 10. Checkpoints: a run's own, and the authors' ----------------------------------------------
def write_atomically(path, data):
    """All of the bytes or none: no reader ever meets half a file, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # A rename is atomic, a write is not; fsync, so that the data is on disk before the rename.
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path):
    """A run folder or a file -> its checkpoint, without running code in it, else InputError."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # compares checksums, which torch.load does not
                raise ValueError("wrong checksum")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # zipfile, pickle and torch have errors of their own
        raise InputError(f"{path} is missing, damaged, or no checkpoint ({error!r:.80})") from None


def save_run(folder, args, history, agent, optimizers, replay):
    """Writes all that the next epoch needs, and metrics.csv and config.json for people."""
    # Weights, Adam's averages, and the actions so far: frames and tokens follow from them. The
    # rewards follow, too; load_run compares them.
    # Flags, but no modes, nor the run's folder.
    saved_args = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str))}
    state = dict(args=saved_args, history=history, agent=agent.state_dict())
    state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    state["actions"] = replay.actions[: replay.size].clone()  # see Game
    state["rewards"] = replay.rewards[: replay.size].clone()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / "checkpoint.pt", buffer.getbuffer())
    write_atomically(folder / "config.json", json.dumps(saved_args, indent=1).encode())
    names = dict.fromkeys(name for row in history for name in row)  # in order, each once
    lines = [",".join(str(row.get(name, "")) for name in names) for row in history]
    write_atomically(folder / "metrics.csv", "\n".join([",".join(names), *lines, ""]).encode())


def load_run(folder, agent, optimizers, game, replay):
    """Restores everything that the run's checkpoint holds -> history."""
    state = read_checkpoint(folder)
    load_weights(agent, state, folder)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    # Playing 100,000 steps again takes two minutes; their frames would be 1.2 GB on disk.
    actions = state["actions"].tolist()
    for i in progress(len(actions), "play again"):
        replay.record(game, actions[i])
    if not torch.equal(replay.rewards[: replay.size].cpu(), state["rewards"]):
        raise InputError(f"{folder}: its actions do not bring back its rewards: another ale-py?")
    return state["history"]


OFFICIAL_NAMES = (  # (pattern in our tensors' names, the authors' names), applied one after another
    (r"^learner", "world_model"),
    (r"coder\.(down|up)_(\d)_(block|attn)_(\d)", r"coder.\1.\2.\3.\4"),
    (r"coder\.(down|up)_(\d)_(downsample|upsample)", r"coder.\1.\2.\3.conv"),
    (r"coder\.mid_", r"coder.mid."),
    (r"..coder\.(pre|post)_quant", r"\1_quant"),
    (r"codebook", "embedding"),
    (r"blocks\.(\d+)\.(proj|qkv)\.", r"blocks.\1.attn.\2."),
    (r"world_model\.(blocks|ln_f)", r"world_model.transformer.\1"),
    (r"action_embedding", "embedder.embedding_tables.0"),
    (r"token_embedding", "embedder.embedding_tables.1"),
    (r"head_token", "head_observations.head_module"),
    (r"head_(reward|end)\.", r"head_\1s.head_module."),
    (r"cnn\.(\d+)", lambda match: f"conv{int(match[1]) // 3 + 1}"),
    (r"\.(actor|critic)\.", r".\1_linear."),
)


def find_official(state_dict, name):
    """An authors' checkpoint, the name of a tensor of ours -> that tensor."""
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    parts = [""]
    if "qkv" in name:  # our one matrix is three of theirs
        parts = ["query", "key", "value"] if "transformer" in name else ["q", "k", "v"]
    return torch.cat([state_dict[name.replace("qkv", part)] for part in parts])


def load_weights(agent, state, path):
    """Puts the weights of a checkpoint, a run's or the authors', into the agent."""
    try:
        weights = state.get("agent") or {name: find_official(state, name) for name in agent.state_dict()}
        agent.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} does not fit the flags, or --env: {str(error)[:150]}") from None


# ---- 11. Pictures: a world model is something to look at -----------------------------------------
def draw(rows):
    """Rows of frames (R, n, 3, 64, 64) in [-1, 1] -> an image, three times as large, for OpenCV."""
    pixels = ((rows.float() + 1) * 127.5).round().to(torch.uint8)
    image = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (64 R, 64 n, 3)
    image = image.flip(-1).cpu().numpy()  # BGR
    return cv2.resize(image, None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST)


@torch.no_grad()
def write_pictures(agent, args, recording, folder):
    """dream.png and dream.gif: a recorded real game, as tokenizer and world model see it."""
    frames, actions, rewards = recording
    real = to_network(frames)  # (n, 3, 64, 64)
    tokens = agent.tokenizer.encode(real)  # (n, K)
    decoded = agent.tokenizer.decode(tokens)
    torch.manual_seed(args.seed)
    # A picture's segment is T steps: the world model knows the first half, and dreams the second.
    T = min(args.sequence_length, len(frames))
    known = T // 2

    def dream_on(firsts, as_played):
        """-> frames (B, T, 3, 64, 64) of the segments that begin at the frames `firsts`."""
        index = torch.tensor(firsts, device=frames.device)[:, None] + torch.arange(T, device=frames.device)
        past = index[:, :known]
        valid = torch.ones_like(past)
        given = actions[index[:, known - 1 : -1]] if as_played else None
        dreamt = imagine(agent, T - known, decoded[past], valid, tokens[past], actions[past], given)
        return torch.cat([decoded[past[:, :-1]], dreamt["frames"]], dim=1)

    # The picture: around the first reward, which tells most about a world model, or in the middle
    # of the game. Captions say what came and what was expected.
    scored = rewards.nonzero().flatten().tolist() + [len(frames) // 2]
    first = max(0, min(scored[0] - known, len(frames) - T))
    part = slice(first, first + T)
    rows = [real[None, part], decoded[None, part], dream_on([first], True), dream_on([first] * 3, False)]
    image = draw(torch.cat(rows))
    image.reshape(6, 192, -1)[:, 174:] //= 4  # dark, so that captions can be read on it
    _, signs, ends = agent.world_model.predict(tokens[None, part], actions[None, part])
    signs, ends = agent.world_model.expected_reward(signs[0]), ends[0].softmax(-1)
    for i in range(T):
        texts = [f"real {rewards[first + i]:+g}", f"expected {signs[i]:+.2f}, end {ends[i, 1]:.2f}"]
        if i < known:
            texts += ["known"] * 4
        else:
            texts += ["dreamt, as played"] + ["dreamt, policy acts"] * 3
        for row, text in enumerate(texts):
            place = (192 * i + 4, 192 * row + 188)
            cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255))
    _, png = cv2.imencode(".png", image)
    write_atomically(folder / "dream.png", png)

    # The film: real beside dreamt; the dream restarts from real frames every T / 2 steps.
    firsts = list(range(0, min(len(frames) - T, 200) + 1, T - known))
    dreamt = dream_on(firsts, True)[:, known:].flatten(0, 1)  # frame `known`, and all after it
    animation = cv2.Animation()
    animation.frames = [draw(torch.stack(pair)[None]) for pair in zip(real[known:], dreamt)]
    animation.durations = np.full(len(dreamt), 80)  # milliseconds
    _, gif = cv2.imencodeanimation(".gif", animation)
    write_atomically(folder / "dream.gif", gif)


@torch.no_grad()
def play(agent, args, recording):
    """The world model as a game, in a window; you are the policy."""
    # The world model dreams a step at a time, from as many of the last frames as fit. It invents
    # whatever has left its context.
    keys = gym.make(args.env).unwrapped.get_keys_to_action()  # such as ("w", " "): up and fire
    moves = {pressed[0]: action for pressed, action in keys.items() if len(pressed) == 1}
    print("keys: w a s d, space to fire, r: another start, q: quit", flush=True)
    recorded = agent.tokenizer.encode(to_network(recording[0]))  # (n, K)
    key = "r"
    while key != "q":
        if key == "r":
            tokens = recorded[None, torch.randint(len(recorded), (1,))]  # (1, 1, K)
            actions = tokens.new_zeros(1, 1)
            score, end = 0.0, False
        elif not end:
            actions[0, -1] = moves.get(key, 0)
            seen = agent.tokenizer.decode(tokens[:, -1])[None]  # (1, 1, 3, 64, 64)
            valid = torch.ones_like(actions)
            dreamt = imagine(agent, 1, seen, valid, tokens, actions, actions[:, -1:])
            score += float(dreamt["rewards"])
            end = bool(dreamt["ends"])
            # One place of T is for the next frame: the oldest has to go.
            kept = args.sequence_length - 1
            tokens = torch.cat([tokens, dreamt["tokens"][:, 1:]], dim=1)[:, -kept:]
            actions = F.pad(actions, (0, 1))[:, -kept:]
        cv2.imshow("iris", draw(agent.tokenizer.decode(tokens[:, -1])[None]))
        cv2.setWindowTitle("iris", f"rewards {score:+.1f}" + (", the end: press r" if end else ""))
        key = chr(cv2.waitKey(66) & 255)  # at most 15 frames a second


# ---- 12. Command line ----------------------------------------------------------------------------
def look_into(args):
    """--eval, --dream and --play: what a run, or an authors' checkpoint, has learned."""
    if args.play and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise InputError("--play opens a window, and there is no display (--dream writes pictures)")
    state = read_checkpoint(args.run)
    num_actions = int(make_env(args.env).single_action_space.n)
    agent = Agent(args, num_actions).to(args.device).eval()
    load_weights(agent, state, args.run)
    act = accelerate(agent.act, args)
    results = args.run if args.run.is_dir() else args.run.with_suffix(".results")
    if args.eval:
        result, _ = evaluate(agent, act, args, args.final_games)
        saved = state.get("args", {}).items()
        result["changed_flags"] = {k: getattr(args, k) for k, v in saved if v != getattr(args, k)}
        name = time.strftime("eval-%Y%m%d-%H%M%S.json")  # eval.json is what training wrote
        write_atomically(results / name, json.dumps(result, indent=1).encode())
        print(summary(result))
        return
    # Dreams begin with real frames: those of a game that the agent plays now.
    _, recording = play_games(agent, act, args, 1, max_steps=1000)
    if args.dream:
        write_pictures(agent, args, recording, results / "media" / "dream")
        print(f"wrote {results / 'media' / 'dream'}")
    else:
        play(agent, args, recording)


def main(argv=None):
    """Command line -> exit code: 0 done, 1 diverged or a bug, 2 bad input or machine, 130 stopped."""
    # The one place where errors become one-line messages. Mistakes in the program stay tracebacks.
    folder = None
    try:
        args = parse_args(argv)
        torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not args.torch_deterministic
        torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for each of a dream's 300 shapes
        if args.eval or args.dream or args.play:
            look_into(args)
            return 0
        # The process id tells apart two runs that begin in the same second.
        now = time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
        name = f"{args.game.replace('/', '-')}__{args.exp_name}__{args.seed}__{now}"
        folder = args.run if args.resume else Path(args.run_dir, name)
        train(args, folder)
        return 0
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    except FloatingPointError as error:
        code, message, folder = 1, str(error), None  # the same epoch would diverge again
    except InputError as error:
        code, message, folder = 2, str(error), None  # resuming would not help
    except (ImportError, OSError, MemoryError, RuntimeError, cv2.error) as error:
        # Only RuntimeErrors of a GPU or of an allocator are the machine's fault.
        machine = isinstance(error, torch.AcceleratorError) or "alloc" in str(error).lower()
        if isinstance(error, RuntimeError) and not machine:
            raise
        code, message = 2, str(error)
    if folder is not None and (folder / "checkpoint.pt").exists():
        message += f"; go on from the last whole epoch: python iris.py --resume {shlex.quote(str(folder))}"
    print("iris.py:", " ".join(message.split())[:600], file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
