# SPDX-License-Identifier: MIT
"""Tests of iris.py, each against something independent: a naive loop, the emulator, the authors' numbers.

python -m pytest test_iris.py    some minutes on two cores; needs neither a GPU nor a network
"""

import base64
import contextlib
import copy
import csv
import json
import lzma
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import ale_py
import cv2
import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ale_py import roms

import iris

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # networks this small gain nothing from threads
SMALL = """--preset small --device cpu --no-mixed-precision --no-perceptual-loss --layers 1 --width 32 --vocab-size 32
    --lstm-size 16 --sequence-length 6 --horizon 5 --context 2 --burn-in 4 --dropout 0.1
    --collect-epochs 1 --collect-steps 300""".split()
TINY = ["--env", "PongNoFrameskip-v4", *SMALL]
PRESETS = pytest.mark.parametrize("preset", ["paper", "small"])


def tiny_args(*flags):
    """The flags of a tiny agent; more flags override."""
    return iris.parse_args([*TINY, *flags])[0]


def same(actual, expected):
    """Asserts that two tensors are equal to the last bit."""
    assert torch.equal(actual, expected)


def close(actual, expected, rtol=1e-3, atol=2e-6):
    """Asserts that two tensors, numbers or lists are equal but for rounding."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def bold_agent(*flags):
    """-> flags, and an agent whose outputs depend strongly on its inputs; those of fresh networks hardly do."""
    args = tiny_args(*flags)
    torch.manual_seed(0)
    agent = iris.Agent(args, 6)
    with torch.no_grad():
        for network in (agent.world_model, agent.actor_critic):
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        agent.tokenizer.codebook.weight.normal_()
        if args.preset == "small":
            agent.world_model.codes.copy_(agent.tokenizer.codebook.weight)
    return args, agent


def random_text(args, batch=2, steps=6):
    """-> tokens (B, T, K) and actions (B, T)."""
    tokens = torch.randint(args.vocab_size, (batch, steps, args.tokens_per_frame))
    return tokens, torch.randint(6, (batch, steps))


# ---- Flags ---------------------------------------------------------------------------------------
PAPER = """epochs 600 collect-epochs 500 collect-steps 200 epsilon 0.01 temperature 1 burn-in 20 horizon 20 context 1
    tokenizer-start 6 world-model-start 26 actor-critic-start 51 learning-rate 0.0001 gamma 0.995 td-lambda 0.95
    tokenizer-updates 200 world-model-updates 200 actor-critic-updates 200 entropy-coef 0.001 lstm-size 512
    tokenizer-batch 256 world-model-batch 64 actor-critic-batch 64 actor-critic-minibatch 64 perceptual-loss 1
    vocab-size 512 tokens-per-frame 16 sequence-length 20 layers 10 width 256 dropout 0.1
    eval-every 5 eval-games 16 eval-temperature 0.5 final-games 100"""


def test_paper_preset():
    """The defaults of --preset paper are the settings that the authors published; games may be called by old ids."""
    args = vars(iris.parse_args(["--preset", "paper"])[0])
    words = PAPER.split()
    for flag, value in zip(words[::2], words[1::2]):
        assert args[flag.replace("-", "_")] == float(value), flag
    for name in ("Pong", "ALE/Pong-v5", "PongNoFrameskip-v4", "PongDeterministic-v4"):
        assert iris.parse_args(["--env", name])[0].env == "Pong"


def test_requirements():
    """The script's own header asks for what requirements.txt has, but pytest."""
    source = Path(iris.__file__)
    (header,) = re.findall(r"^# dependencies = (\[.*\])$", source.read_text(), re.MULTILINE)
    wanted = source.with_name("requirements.txt").read_text().split()
    assert json.loads(header) == [line for line in wanted if not line.startswith("pytest")]


# ---- Environment: real games, against the bare emulator ------------------------------------------
ROMS = dict(Pong="pong", MsPacman="ms_pacman", Breakout="breakout")


class RawGame:
    """A game on the emulator itself, raw frame by raw frame, after the no-ops that make_env gives it."""

    def __init__(self, game, seed, training=True):
        env = iris.make_env(game, training=training)
        _, info = env.reset(seed=seed)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(ROMS[game]))
        self.ale.reset_game()
        for _ in range(int(info["episode_frame_number"][0])):
            self.ale.act(0)
        self.frame = self.ale.getScreenRGB()

    def step(self, action):
        """Four raw frames -> their reward; self.frame is then the maximum of the last two."""
        action = self.ale.getMinimalActionSet()[action]
        reward = 0
        for _ in range(4):
            before = self.ale.getScreenRGB()
            reward += self.ale.act(action)
        self.frame = np.maximum(before, self.ale.getScreenRGB())
        return reward


@pytest.mark.parametrize("game", ROMS)
def test_evaluations_equal_the_emulator(game):
    """A step is four raw frames, no action is sticky, and only the end of the game is an end."""
    env = iris.make_env(game, training=False)
    frames, _ = env.reset(seed=5)
    raw = RawGame(game, 5, training=False)
    assert env.single_action_space.n == len(raw.ale.getMinimalActionSet())
    rng = np.random.default_rng(3)
    while not raw.ale.game_over() and raw.ale.getFrameNumber() < 2000:
        assert np.array_equal(frames[0, 0], raw.frame)
        action = rng.integers(env.single_action_space.n, size=1)
        frames, rewards, terminated, truncated, _ = env.step(action)
        assert rewards[0] == raw.step(action[0])
        assert (terminated[0], truncated[0]) == (raw.ale.game_over(), False)
    assert raw.ale.game_over() == (game != "Pong")


@pytest.mark.parametrize("game", ROMS)
def test_resize(game):
    """Real screens become 64 x 64 as by an antialiased bilinear filter: no pixel is skipped."""
    raw = RawGame(game, 0)
    for action in (1, 2, 3) * 30:
        raw.step(action)
    weights = []  # (64, size) each: an output is the mean of what is near, weighted by a triangle
    for size in raw.frame.shape[:2]:
        scale = size / 64
        centers = (np.arange(64)[:, None] + 0.5) * scale
        triangle = np.maximum(1 - np.abs(np.arange(size) + 0.5 - centers) / scale, 0)
        weights.append(triangle / triangle.sum(1, keepdims=True))
    expected = np.einsum("ih,hwc,jw->ijc", weights[0], raw.frame, weights[1])
    (frame,) = iris.resize(raw.frame[None, None])
    assert np.abs(frame.numpy() - expected).max() < 2
    assert expected.std() > 10


def test_no_op_that_loses_a_life():
    """The no-op after a lost life may lose another: all rewards count, and the game goes on."""
    game = iris.Game("Breakout", 0)
    frames = np.zeros((1, 1, 64, 64, 3), np.uint8)
    rest = [False], {"episode_frame_number": [0]}  # the counter never goes back: it is the same game
    told = [(frames, [1], [True], *rest), (frames, [2], [True], *rest), (frames, [4], [False], *rest)]
    game.env.step = Mock(side_effect=told)
    assert game.step(3) == (7.0, True, None)


def test_environment_starts():
    """In training the seed decides about up to 29 no-ops; evaluations all begin alike."""
    seeds = [*range(40), 7]
    for training in (True, False):
        env = iris.make_env("Pong", training=training)
        counts = [int(env.reset(seed=seed)[1]["episode_frame_number"][0]) for seed in seeds]
        assert counts[7] == counts[-1]
        assert (len(set(counts)) > 10) == training
        assert not training or 20 < max(counts) < 30
    assert len(set(counts)) == 1


def test_time_limit():
    """After 20,000 raw frames a new game begins, which is no end."""
    game = iris.Game("Breakout", 0)  # it waits for ever for its fire button
    for t in range(1, 5001):
        assert game.number == 0
        assert game.step(0) == (0.0, False, None if t < 5000 else 0.0)
        assert game.is_first == (t == 5000)
    assert game.number == 1


@pytest.mark.parametrize("name", ["Breakout", "MsPacman"])
def test_games_against_the_emulator(name):
    """Two whole games, life after life, are those of the emulator with the seeds 40 and 41."""
    game = iris.Game(name, 40)
    raw = RawGame(name, 40)
    rng = np.random.default_rng(0)
    first, score, scores = True, 0, []
    while len(scores) < 2:
        same(game.frame, iris.resize(raw.frame[None, None])[0])
        assert (game.is_first, game.number) == (first, len(scores))
        action = int(rng.integers(game.num_actions))
        lives = raw.ale.lives()
        reward = raw.step(action)
        first = raw.ale.lives() < lives
        over = raw.ale.game_over()
        if first and not over:
            reward += raw.step(0)  # this no-op brings the next life's first frame
        score += reward
        assert game.step(action) == (reward, first, score if over else None)
        if over:
            scores.append(score)
            score = 0
            raw = RawGame(name, 40 + len(scores))
    assert max(scores) > 0


# ---- Replay --------------------------------------------------------------------------------------
LENGTHS = (1, 3, 50, 7, 200)  # of the episodes; the last is still running


def filled_replay():
    """Five episodes, whose rewards say at which step of its episode a step is."""
    replay = iris.Replay(tiny_args())
    for length in LENGTHS:
        for t in range(length):
            game = Mock(frame=torch.full((64, 64, 3), t), is_first=t == 0)
            game.step.return_value = float(t), length < 200 and t == length - 1, None
            replay.record(game, t % 5)
    return replay


@pytest.mark.parametrize("anchor", ["start", "end"])
@pytest.mark.parametrize("steps", [1, 6, 21])
def test_segments(anchor, steps):
    """Episodes come up equally often, and their steps; what an episode lacks is invalid."""
    replay = filled_replay()
    assert replay.ends.nonzero().flatten().tolist() == [0, 3, 53, 60]
    torch.manual_seed(0)
    index, valid = replay.sample(20_000, steps, anchor)
    anchors = index[:, 0 if anchor == "start" else -1].numpy()
    counts = np.bincount(anchors, minlength=261)
    owner = np.repeat(np.arange(5), LENGTHS)  # the episode of every step
    wanted = 4000 / np.array(LENGTHS)[owner]
    assert (abs(counts - wanted) < 5 * np.sqrt(wanted)).all()
    for step, segment, inside in zip(anchors[:500], index.tolist(), valid.tolist()):
        begin = step if anchor == "start" else step - steps + 1
        for t in range(steps):
            exists = 0 <= begin + t < 261 and owner[begin + t] == owner[step]
            assert inside[t] == exists
            assert owner[segment[t]] == owner[step]
            assert segment[t] == begin + t or not exists
    assert steps == 1 or not valid.all()


# ---- Tokenizer -----------------------------------------------------------------------------------
def test_tokenizer_loss(monkeypatch):
    """Loss and gradients are a naive version's; the decoder's passes straight to the latents."""
    tokenizer = bold_agent("--preset", "paper")[1].tokenizer
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    z = torch.randn(3, 512, 16, requires_grad=True)
    monkeypatch.setattr(tokenizer.encoder, "forward", lambda _: z)

    def distance(a, b):  # any will do in the place of LPIPS
        return ((a - b) ** 4).mean((1, 2, 3))

    loss, _ = tokenizer.loss(x, distance)
    loss.backward()
    tokens = tokenizer.quantize(z)
    z_q = tokenizer.embed(tokens).detach().requires_grad_()
    naive = 0
    for image, drawn in zip(x, tokenizer.decoder(z_q)):
        d = image - drawn
        naive = naive + (d.abs() + d**4).mean() / 3
    naive.backward()
    gap = (z - z_q).detach()
    close(loss, naive + 2 * gap.square().mean(), rtol=1e-5)
    close(z.grad, z_q.grad + 2 * gap / gap.numel(), rtol=1e-4, atol=1e-7)
    expected = torch.zeros(32, 512)  # the codebook's gradient: codes are pulled to their latents
    for n in range(3):
        for place in range(16):
            expected[tokens[n, place]] -= 2 * gap[n, :, place] / gap.numel()
    close(tokenizer.codebook.weight.grad, expected, rtol=1e-4, atol=1e-7)


# ---- World model ---------------------------------------------------------------------------------
@torch.no_grad()
def test_world_model_loss():
    """Which position predicts what, one by one; neither padding nor what lies beyond the segment counts."""
    args, agent = bold_agent()
    world_model = agent.world_model
    tokens, actions = random_text(args)
    rewards = torch.randint(-3, 4, (2, 6))
    ends = torch.randint(2, (2, 6))
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    token_losses, reward_losses, end_losses = [], [], []
    for segment, hidden in enumerate(world_model(world_model.embed(tokens, actions))):
        for position, h in enumerate(hidden):
            step, place = divmod(position, 17)  # a step is 16 tokens and an action
            if place == 16 and valid[segment, step]:
                sign = rewards[segment, step].sign() + 1
                reward_losses.append(F.cross_entropy(world_model.head_reward(h), sign))
                end_losses.append(F.cross_entropy(world_model.head_end(h), ends[segment, step]))
            step, place = divmod(position + 1, 17)
            if place < 16 and step < 6 and valid[segment, step]:  # a token comes next
                token = tokens[segment, step, place]
                token_losses.append(F.cross_entropy(world_model.head_token(h), token))
    naive = [torch.stack(losses).mean() for losses in (token_losses, reward_losses, end_losses)]
    loss, _ = world_model.loss(tokens, actions, rewards, ends, valid)
    close(loss, sum(naive), 1e-5)


@PRESETS
def test_optimizers(preset):
    """The optimizer has every parameter once; only matrices of the transformer decay, none of its embeddings."""
    agent = bold_agent("--preset", preset)[1]
    groups = iris.make_optimizer(agent, 1e-3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    decaying, others = ([id(p) for p in group["params"]] for group in groups)
    assert sorted(decaying + others) == sorted(id(p) for p in agent.parameters())
    named = agent.world_model.named_parameters()
    matrices = [id(p) for name, p in named if p.dim() == 2 and "emb" not in name]
    assert sorted(decaying) == sorted(matrices)


def test_networks_learn_alone():
    """A step of one network moves none of the others, although they share an optimizer with momentum."""
    flags = "--world-model-updates 2 --actor-critic-updates 2 --actor-critic-batch 4"
    args, agent = bold_agent(*flags.split())
    optimizer = iris.make_optimizer(agent, 1e-3)
    for name in ("world_model", "actor_critic", "world_model"):
        before = copy.deepcopy(agent.state_dict())
        getattr(iris, f"train_{name}")(agent, optimizer, filled_replay(), args, {})
        changed = [key for key, x in agent.state_dict().items() if not torch.equal(x, before[key])]
        assert {key.split(".")[0] for key in changed} == {name}


# ---- Actor-critic --------------------------------------------------------------------------------
def naive_returns(rewards, values, ends, gamma, lambda_):
    """The equation of appendix B for one dream: each return is made of the next step's."""
    if len(rewards) == 0:
        return [values[0]]  # the return after the last step is the last frame's value
    later = naive_returns(rewards[1:], values[1:], ends[1:], gamma, lambda_)
    if ends[0]:
        return [rewards[0], *later]
    return [rewards[0] + gamma * ((1 - lambda_) * values[1] + lambda_ * later[0]), *later]


def test_lambda_returns():
    """They are those of the equation, with ends anywhere."""
    torch.manual_seed(0)
    rewards, values = torch.randn(20, 7), torch.randn(20, 8)
    ends = (torch.rand(20, 7) < 0.2).float()
    returns = iris.lambda_returns(rewards, values, ends, 0.9, 0.7)
    for b in range(20):
        close(returns[b], naive_returns(rewards[b], values[b], ends[b], 0.9, 0.7)[:-1], 1e-5)


def naive_policy_loss(policy, dream, args):
    """The policy stepped from frame to frame; then dream by dream, step by step, up to the end."""
    state = dream["state"]
    policies, values = [], []
    for t in range(5):
        logits, value, state = policy(dream["frames"][:, t : t + 1], state)
        policies.append(torch.distributions.Categorical(logits=logits[:, 0]))
        values.append(value[:, 0])
    values = torch.stack(values, dim=1)
    terms = []
    for b in range(4):
        rewards, ends = dream["rewards"][b], dream["ends"][b]
        returns = naive_returns(rewards, values[b].detach(), ends, args.gamma, args.td_lambda)
        for t in range(4):
            if not ends[:t].any():  # what is dreamt after an end is worth nothing
                score = policies[t].log_prob(dream["actions"][:, t])[b]
                entropy = policies[t].entropy()[b]
                terms.append(torch.stack([returns[t] - values[b, t], score, entropy]))
    advantage, score, entropy = torch.stack(terms, dim=1)
    gain = advantage.detach()
    if args.preset == "small":
        gain = gain / (gain.square().mean().sqrt() + 0.01)
    return (advantage**2 - score * gain - args.entropy_coef * entropy).mean()


@PRESETS
def test_actor_critic_loss(preset):
    """Loss and gradients are a naive version's; nothing is learned from what follows an end."""
    args, agent = bold_agent("--entropy-coef", "0.3", "--preset", preset)
    policy = agent.actor_critic
    dream = dict(frames=torch.rand(4, 5, 3, 64, 64) * 2 - 1, state=torch.randn(4, 2, 16))
    dream["actions"] = torch.randint(6, (4, 4))
    dream["rewards"] = torch.randint(-1, 2, (4, 4)).float()
    dream["ends"] = (torch.rand(4, 4) < 0.3).float()
    loss, _ = policy.loss(dream, args)
    naive = naive_policy_loss(policy, dream, args)
    close(loss, naive, 1e-5)
    parameters = list(policy.parameters())
    actual = torch.autograd.grad(loss, parameters)
    for gradient, expected in zip(actual, torch.autograd.grad(naive, parameters)):
        assert expected.abs().max() > 1e-3
        close(gradient, expected, 1e-3, 1e-5)


# ---- Imagination ---------------------------------------------------------------------------------
def naive_sample(logits):
    """One random number a row, looked up among the sums of the probabilities."""
    u = torch.rand(len(logits), 1).double()
    sums = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, u, right=True)[:, 0]


@torch.no_grad()
def naive_dream(agent, tokens, past_actions, frame, state, steps, actions=None, draw=naive_sample):
    """A dream by the book: for every single token the world model reads the whole text so far."""
    world_model = agent.world_model
    text = world_model.embed(tokens, F.pad(past_actions, (0, 1)))[:, :-1]
    dream = dict(frames=[frame], tokens=[tokens[:, -1]], actions=[], rewards=[], ends=[])
    for t in range(steps):
        logits, _, state = agent.actor_critic(frame[:, None], state)
        action = draw(logits[:, 0]) if actions is None else actions[:, t]
        vector = world_model.action_embedding(action)
        text = torch.cat([text, vector[:, None]], dim=1)
        h = world_model(text)[:, -1]
        reward = world_model.head_reward(h)
        if isinstance(world_model, iris.LocalWorldModel):
            loss, _, win = reward.softmax(-1).unbind(-1)
            reward = win - loss
        else:
            reward = draw(reward) - 1.0
        end = draw(world_model.head_end(h)).float()
        words = []
        for _ in range(tokens.shape[2]):
            h = world_model(text)[:, -1]
            words.append(draw(world_model.head_token(h)))
            vector = world_model.token_vectors()[words[-1]]
            text = torch.cat([text, vector[:, None]], dim=1)
        words = torch.stack(words, dim=1)
        frame = agent.tokenizer.decoder(agent.tokenizer.embed(words)).clamp(-1, 1)
        new = dict(frames=frame, tokens=words, actions=action, rewards=reward, ends=end)
        for name, column in dream.items():
            column.append(new[name])
    return {name: torch.stack(column, dim=1) for name, column in dream.items()}


@torch.no_grad()
@pytest.mark.parametrize("context, forced", [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize("flags", ["", "--tokens-per-frame 64", "--preset paper --tokens-per-frame 64"])
def test_dream_equals_step_by_step(context, forced, flags):
    """With the same random numbers, a dream is the one by the book; padding has no part in it."""
    args, agent = bold_agent("--layers", "2", *flags.split())
    torch.manual_seed(1)
    steps = args.sequence_length - context  # as many as there are positions for
    tokens, actions = random_text(args, 3, context)
    past = tokens, actions[:, :-1]
    seen = torch.rand(3, 5, 3, 64, 64) * 2 - 1
    padding = (0, 2, 4)  # frames
    valid = torch.arange(5) >= torch.tensor(padding)[:, None]
    played = torch.randint(6, (3, steps)) if forced else None
    torch.manual_seed(2)
    fast = iris.imagine(agent, steps, seen, valid, *past, played)
    states = []
    for b, first in enumerate(padding):
        state = agent.actor_critic.initial_state(1)
        if first < 4:
            _, _, state = agent.actor_critic(seen[b, None, first:4], state)
        states.append(state)
    state = torch.cat(states)
    close(fast["state"], state, 1e-4, 1e-5)
    torch.manual_seed(2)
    slow = naive_dream(agent, *past, seen[:, -1], state, steps, played)
    heads = 4 if args.preset == "paper" else 1  # those with keys and values of their own
    positions = 6 * (args.tokens_per_frame + 1)
    assert agent.world_model.empty_caches(3).shape == (2, 3, 2 * heads, positions, 8)
    for name in ("tokens", "actions", "ends"):
        same(fast[name], slow[name])
    for name in ("rewards", "frames"):
        close(fast[name], slow[name], 1e-4, 1e-4)
    assert not forced or torch.equal(fast["actions"], played)
    assert len(slow["tokens"].unique()) > 10  # it does not always dream the same
    assert len(slow["actions"].unique()) > 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph wants a GPU")
@pytest.mark.parametrize("mixed", ["--mixed-precision", "--no-mixed-precision"])
def test_cuda_graph(mixed, monkeypatch):
    """Dreams through the CUDA graph are those without, for new inputs and new weights too."""
    args, agent = bold_agent(mixed)
    args.device = "cuda"
    agent.cuda()
    monkeypatch.setattr(iris, "sample", lambda logits: logits.argmax(-1))  # nothing random is left
    plain = partial(iris.imagine, agent, args.horizon - 1)
    graph = iris.accelerate(plain, args)
    for seed in range(3):
        torch.manual_seed(seed)
        tokens, actions = random_text(args, 3, 1)
        valid = torch.rand(3, 5) < 0.8
        frames = torch.rand(3, 5, 3, 64, 64) * 2 - 1
        inputs = [x.cuda() for x in (frames, valid, tokens, actions[:, :-1])]
        state = torch.cuda.get_rng_state()
        replayed = graph(*inputs)
        assert torch.equal(torch.cuda.get_rng_state(), state)  # recording has not moved the generator on
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, args.mixed_precision):
            eager = plain(*inputs)
        for name in eager:
            same(replayed[name], eager[name])
        for parameter in agent.parameters():
            parameter.data.mul_(1.01)


# ---- Training ------------------------------------------------------------------------------------
def test_update():
    """A gradient longer than 10 is scaled to that length; the metrics say how long it was, and hold no graph."""
    network = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)

    def loss(slope):
        value = slope * network.weight.sum() / math.sqrt(2)
        return value, dict(value=value)

    network.loss = loss
    log = {}
    for slope, length in ((3.0, 3.0), (40.0, 10.0)):
        before = network.weight.clone()
        iris.update(log, "x", network, optimizer, tiny_args(), slope)
        close((before - network.weight).norm(), length)
    close(log["x_gradient"], [3.0, 40.0])  # of every update
    assert not any(values.requires_grad for values in log.values())


def test_collecting():
    """The policy's memory is empty when an episode begins; a new epoch fills it with the last --burn-in frames."""
    args, agent = bold_agent("--collect-steps", "7", "--collect-epochs", "40", "--epsilon", "0.3")
    calls = []

    def act(frames, state, temperature):
        calls.append((frames[0], int(state[0, 0, 0])))
        return torch.ones(1, dtype=torch.long), state + 1  # memory counts frames

    agent.act = act
    game, replay = iris.Game("Breakout", 0), iris.Replay(args)
    shorter = 0
    for begun in range(0, 280, 7):
        calls.clear()
        iris.collect(agent, game, replay, args)
        frames, memory = zip(*calls, strict=True)
        same(torch.stack(frames), replay.frames[replay.size - len(frames) : replay.size])
        starts = replay.starts[: replay.episodes]
        for step in range(begun, begun + 7):
            start = int(starts[starts <= step].max())
            assert memory[step - replay.size] == step - max(start, begun - args.burn_in)
        shorter += len(frames) - 7 < args.burn_in
    assert 1 < shorter < 40  # episodes that began shortly before an epoch did
    assert 0.1 < (replay.actions[:280] != 1).float().mean() < 0.35  # 0.3, but a quarter of these are 1, too


def test_dreams_begin_in_the_replay(monkeypatch):
    """Training's dreams know the last frames that the policy has seen; each is in one update."""
    args, agent = bold_agent("--actor-critic-updates", "1", "--actor-critic-minibatch", "24")
    replay = filled_replay()
    replay.tokens.random_(32)
    replay.reconstructions.random_(256)
    agent.dream = Mock(return_value=dict(numbers=torch.arange(64)))
    monkeypatch.setattr(iris, "update", Mock())
    torch.manual_seed(1)
    iris.train_actor_critic(agent, None, replay, args, {})
    frames, valid, tokens, actions = agent.dream.call_args.args
    torch.manual_seed(1)  # the same draw once more
    index, expected = replay.sample(64, 5, "end")
    same(valid, expected)
    same(iris.to_bytes(frames), replay.reconstructions[index])
    same(tokens, replay.tokens[index[:, -2:]])
    same(actions, replay.actions[index[:, -2:-1]])
    numbers = [call.args[5]["numbers"] for call in iris.update.call_args_list]
    assert [len(part) for part in numbers] == [24, 24, 16]
    same(torch.cat(numbers), torch.arange(64))


@torch.no_grad()
def test_tokens_of_old_frames():
    """Frames keep their tokens while the tokenizer stays as it is, and get new ones when it changes."""
    args, agent = bold_agent("--collect-steps", "900")
    replay = iris.Replay(args)
    replay.frames[:] = torch.randint(256, replay.frames.shape, dtype=torch.uint8)
    encode = agent.tokenizer.encode
    agent.tokenizer.encode = Mock(wraps=encode)
    for size, chunks in ((300, 2), (600, 2), (700, 3), (900, 4)):
        replay.size = size
        if size > 600:
            iris.adapt(agent, replay)  # it picks codes
        agent.tokenizer.encode.reset_mock()
        iris.tokenize_replay(agent, replay, args)
        calls = agent.tokenizer.encode.call_args_list
        assert [len(call.args[0]) for call in calls] == [256] * chunks
        tokens = encode(iris.to_network(replay.frames[:size]))
        same(replay.tokens[:size], tokens)
        same(replay.reconstructions[:size], iris.to_bytes(agent.tokenizer.decode(tokens)))


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_average_of_the_weights(decay):
    """The world model ends an epoch with the moving average of its weights; the paper's, with the last ones."""
    args, agent = bold_agent("--weight-average", str(decay), "--world-model-updates", "3")
    weight, seen = agent.world_model.pos_emb.weight, []
    optimizer = iris.make_optimizer(agent, 1e-3)
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    iris.train_world_model(agent, optimizer, filled_replay(), args, {})
    first, second, third = seen
    average = decay * (decay * first + (1 - decay) * second) + (1 - decay) * third
    close(weight.detach(), average)
    assert (weight - third).abs().max() > 1e-4 or decay == 0


@pytest.mark.parametrize("columns", [40, 200])
def test_progress_fits_the_terminal(columns, capfd, monkeypatch):
    """Progress stays in one line of the terminal, and leaves nothing of the text before."""
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((columns, 24)))
    assert list(iris.progress(3, "a label " * 8)) == [0, 1, 2]
    iris.show("short")
    pieces = capfd.readouterr().err.strip("\r").split("\r\r")
    assert [len(piece) for piece in pieces] == [columns - 1] * 4
    assert pieces[-1].strip() == "short"
    assert "\n" not in "".join(pieces)


# ---- The small preset ----------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("side", [16, 8])
def test_picked_codes(side):
    """Every square of some mosaics becomes a code, a rare one too; codes once picked never change."""
    torch.manual_seed(0)
    squares = torch.randint(256, (14, side, side, 3), dtype=torch.uint8)
    choice = torch.randint(9, (100, 64 // side, 64 // side))
    choice[50, 2, 1] = 9  # the rare one
    args = tiny_args("--vocab-size", "250", "--tokens-per-frame", str(choice[0].numel()))
    tokenizer = iris.Agent(args, 6).tokenizer
    codes = tokenizer.codebook.weight
    address = codes.data_ptr()
    for call, (first, last) in enumerate([(0, 63), (63, 126), (126, 189), (189, 250)]):
        choice[call, 0, 0] = 10 + call  # something new each time
        mosaics = squares[choice].permute(0, 1, 3, 2, 4, 5).reshape(100, 64, 64, 3)
        x = iris.to_network(mosaics)
        before = codes.clone()
        tokenizer.pick_codes(x)
        changed = (codes != before).any(1).nonzero().flatten()
        assert changed.tolist() == list(range(first, last))
        close(tokenizer.decode(tokenizer.encode(x)), x, 0, 1e-5)
    assert tokenizer.picked == 250
    assert codes.data_ptr() == address  # CUDA graphs go on reading there


@torch.no_grad()
def test_pixels_of_local_tokens():
    """A local token is embedded as itself and by its code's pixels, centred and scaled."""
    args, agent = bold_agent()
    tokens, actions = random_text(args)
    codes = agent.tokenizer.codebook.weight
    pixels = (codes - codes.mean(0)) / codes.var(0, correction=0).sum().sqrt()
    expected = agent.world_model.token_embedding(tokens)
    expected = expected + pixels[tokens] @ agent.world_model.project_pixels.weight.T
    embedded = agent.world_model.embed(tokens, actions).unflatten(1, (6, -1))
    close(embedded[:, :, :-1], expected)


@torch.no_grad()
def test_whitened_pixels():
    """What the small preset's policy sees of a frame: distances from the mean, in standard deviations."""
    policy = bold_agent()[1].actor_critic
    seen = []
    policy.cnn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    scale = torch.rand(3, 64, 64) * (torch.rand(3, 64, 64) > 0.3)  # some pixels never change
    policy.measure(torch.randn(100, 3, 64, 64) * scale + 0.3)
    frames = torch.randn(50, 3, 64, 64) * scale + 0.3
    policy.measure(frames)  # the frames before are forgotten
    pooled = frames.view(50, 3, 32, 2, 32, 2).mean((3, 5))
    distance = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 0.05**2).sqrt()
    for x in (frames, 10 * frames):
        policy(x[:, None], policy.initial_state(50))
    close(seen[0], distance.clamp(-5, 5), 1e-3, 1e-4)
    assert seen[0].std() > 0.5
    assert seen[1].abs().max() == 5


# ---- Evaluation ----------------------------------------------------------------------------------
class ScriptedGames:
    """Game i pays i + 1 a step for lengths[i] steps, then what nobody may count. Frames say the step."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def reset(self, seed):
        self.steps = -1
        return self.step(None)[0], {}

    def step(self, actions):
        self.steps += 1
        games = np.arange(len(self.lengths))
        frames = np.full((len(games), 1, 64, 64, 3), self.steps, np.uint8)
        rewards = np.where(self.steps <= self.lengths, games + 1, 100)
        return frames, rewards, self.steps == self.lengths, games < 0, {}


def test_evaluation(monkeypatch, tmp_path, capfd):
    """Games count to their last step, and not beyond it; the figures are those by hand; short games have pictures."""
    args, agent = bold_agent()
    env = ScriptedGames([3, 5, 4])
    monkeypatch.setattr(iris, "make_env", lambda env_id, games, training: env)
    _, (frames, actions, rewards) = iris.play_games(agent, args, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert len(actions) == rewards.sum() == 3 < args.horizon < args.sequence_length
    assert iris.evaluate(agent, args, 3, tmp_path / "a") == pytest.approx(25 / 3)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["returns"] == [3, 10, 12]
    assert result["interval"] == pytest.approx(1.96 * np.std([3, 10, 12], ddof=1) / math.sqrt(3))
    said = capfd.readouterr().out
    assert said.startswith("Pong: 8.3 +- 5.3 (95 %)")
    assert "random -20.7, human 14.6, IRIS 14.6; normalised 0.822" in said
    assert cv2.imread(str(tmp_path / "a.png")) is not None
    env.lengths = np.array([2])  # one game has no interval, an unknown one no score to compare with
    args.env = "Klax"
    iris.evaluate(agent, args, 1, tmp_path / "b")
    assert not re.search("[+]-|human", capfd.readouterr().out)


# ---- Files: runs of real Pong --------------------------------------------------------------------
# Four epochs: the world model joins in the second, the policy in the third.
SCHEDULE = """--epochs 4 --collect-epochs 3 --collect-steps 40 --tokenizer-start 1 --world-model-start 2
    --actor-critic-start 3 --world-model-updates 3 --actor-critic-updates 3 --tokenizer-batch 4 --world-model-batch 4
    --actor-critic-batch 4 --eval-every 4 --eval-games 1 --final-games 2""".split()


def command(*flags):
    """The program with these flags, as a list for subprocess."""
    return [sys.executable, iris.__file__, *(str(flag) for flag in flags)]


def finish(*flags):
    """Runs the program to its end."""
    return subprocess.run(command(*flags), capture_output=True, text=True)


def run_main(*flags):
    """The program in this process -> its exit code."""
    try:
        return iris.main([str(flag) for flag in flags])
    except SystemExit as stop:  # argparse's
        return stop.code


def error_of(capfd, hint=False):
    """What the program says on stderr -> its one line, and the flags of the hint in the line after it."""
    others = r"A\.L\.E|\[Powered|\r"  # the emulator's greeting, torch's download
    line, *more = re.findall(rf"^(?!{others}).+$", capfd.readouterr().err, re.MULTILINE)
    assert line.startswith(("iris.py: error: ", "iris.py: stopped"))
    assert len(more) == hint
    words = shlex.split(more[0].removeprefix("Go on from the last whole epoch: ")) if hint else []
    assert words[:2] == ["python", sys.argv[0]] * hint
    return line, words[2:]


def contents(folder):
    """All files of a run, with their bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def essence(x):
    """All but what a clock says, or where the run is; tensors as bytes, so that nan is nan."""
    if isinstance(x, dict):
        kept = [name for name in x if name != "args" and "second" not in str(name)]
        return {name: essence(x[name]) for name in kept}
    if isinstance(x, (list, tuple)):
        return [essence(value) for value in x]
    return x.numpy().tobytes() if isinstance(x, torch.Tensor) else x


def read_run(folder):
    """All that a run leaves behind and that must repeat to the last bit."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    result = json.loads((folder / "eval.json").read_text())
    return essence(dict(rows=list(rows), state=iris.read_checkpoint(folder), result=result))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = finish(*TINY, *SCHEDULE, "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    assert all(f"epoch {i}/4" in done.stdout for i in (1, 2, 3, 4))
    return next(run_dir.iterdir())


@pytest.fixture
def a_run(whole_run, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(whole_run, tmp_path / "run")


def short_games(monkeypatch, frames=100):
    """Games end after so many raw frames."""
    make = gymnasium.make_vec

    def shorter(*game, **options):
        return make(*game, **options | dict(max_num_frames_per_episode=frames))

    monkeypatch.setattr(gymnasium, "make_vec", shorter)


def test_whole_training(whole_run):
    """A run collects real Pong, trains its networks, draws, and its actions bring back its frames."""
    args, checkpoint = iris.parse_args(["--resume", str(whole_run)])
    rows = read_run(whole_run)["rows"]
    assert [row["real_steps"] for row in rows] == ["40", "80", "120", "120"]
    for name, first in (("token_loss", 2), ("policy_loss", 3), ("eval_return", 4)):
        assert [row[name] != "" for row in rows] == [epoch >= first for epoch in (1, 2, 3, 4)]
    assert float(rows[3]["entropy"]) < math.log(6) + 0.01  # metrics are means over updates, not sums
    weights = checkpoint["agent"]
    torch.manual_seed(args.seed)
    for name, weight in iris.Agent(args, 6).named_parameters():
        assert not torch.equal(weight, weights[name]), name
    same(weights["world_model.codes"], weights["tokenizer.codebook.weight"])
    for name in ("eval", "media/epoch_004"):
        assert cv2.imread(str(whole_run / f"{name}.png")).std() > 5
        assert (whole_run / f"{name}.webp").exists()
    game, again = (iris.Game("Pong", args.seed * 100_000) for _ in range(2))
    replay = iris.Replay(args)
    agent = iris.Agent(args, 6)
    iris.load_run(whole_run, checkpoint, agent, iris.make_optimizer(agent, 1e-3), again, replay)
    for i, action in enumerate(checkpoint["actions"].tolist()):
        same(replay.frames[i], game.frame)
        assert game.step(action)[:2] == (replay.rewards[i], replay.ends[i])
    assert (replay.size, replay.episodes) == (120, 1)
    same(again.frame, game.frame)


def test_paper_training(hub, tmp_path, monkeypatch):
    """The paper's preset, with LPIPS, trains every weight of its networks."""
    monkeypatch.setattr(iris, "CHUNK", 16)
    short_games(monkeypatch)
    flags = "--preset paper --perceptual-loss --tokenizer-updates 1 --collect-steps 8".split()
    assert run_main(*TINY, *SCHEDULE, *flags, "--run-dir", tmp_path) == 0
    (folder,) = tmp_path.iterdir()
    args, checkpoint = iris.parse_args(["--eval", str(folder)])
    torch.manual_seed(args.seed)
    for name, weight in iris.Agent(args, 6).named_parameters():
        assert not torch.equal(weight, checkpoint["agent"][name]), name


@pytest.mark.parametrize("how, output", [("SIGKILL", ""), ("SIGTERM", ">&- 2>&-"), ("SIGINT", ">/dev/full 2>&-")])
def test_stopped_and_resumed(how, output, whole_run, tmp_path):
    """Stopped at a random moment and resumed, a run ends as the undisturbed one, even if its terminal has gone."""

    def listen():  # a shell's background jobs, and so their tests, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    start = command(*TINY, *SCHEDULE, "--run-dir", tmp_path)
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        while not any(",token_loss" in path.read_text() for path in tmp_path.glob("*/metrics.csv")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(getattr(signal, how))
        errors = process.stderr.read()
    (folder,) = tmp_path.iterdir()
    assert process.returncode == (130 if how == "SIGINT" else -getattr(signal, how))
    assert not (folder / "eval.json").exists()
    assert how != "SIGINT" or "iris.py: stopped\nGo on" in errors
    resume = shlex.join(command("--resume", folder))
    assert subprocess.run(f"{resume} {output}", shell=True).returncode == 0
    assert read_run(folder) == read_run(whole_run)


@pytest.mark.parametrize("name", ["my  runs", "-dash", "it's $HOME"])
def test_hint_can_be_pasted(name, tmp_path, capfd, monkeypatch):
    """Whatever the folder's name is, a shell gives it back; a run stopped in its first epoch has a hint, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(iris, "collect", Mock(side_effect=KeyboardInterrupt))
    assert run_main(*TINY, *SCHEDULE, f"--run-dir={name}") == 130
    _, flags = error_of(capfd, hint=True)
    args, checkpoint = iris.parse_args(flags)
    assert args.resume.parent == Path(name)
    assert checkpoint["history"] == []


def test_finished_run_goes_on(whole_run, a_run, capfd, monkeypatch):
    """A finished run repeats its evaluation if resumed; more epochs train on, where the emulator is the same."""
    (a_run / "eval.json").unlink()
    assert run_main("--resume", a_run) == 0
    before = read_run(whole_run)
    assert read_run(a_run) == before
    edit(a_run, lambda state: state["args"].update(device="cuda"))  # as if from a GPU: it goes on without one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_main("--resume", a_run, "--epochs", 5, "--collect-epochs", 5) == 0
    after = read_run(a_run)
    assert after["rows"][:4] == before["rows"]
    assert after["rows"][4]["real_steps"] == "160"
    assert after["state"]["agent"] != before["state"]["agent"]
    edit(a_run, lambda state: state["rewards"].add_(1))
    capfd.readouterr()
    assert run_main("--resume", a_run) == 2
    assert "ale-py" in error_of(capfd)[0]


def test_eval(a_run, capfd, monkeypatch):
    """--eval repeats training's last evaluation in files of its own, and a folder that is read-only is no failure."""
    before = contents(a_run)
    trained = json.loads((a_run / "eval.json").read_text())
    for flags, other in (([], {}), (["--final-games", 1], dict(final_games=1))):
        assert run_main("--eval", a_run, *flags) == 0
        (path,) = a_run.glob("eval-*.json")
        result = json.loads(path.read_text())
        assert f"Pong: {result['mean']:.1f}" in capfd.readouterr().out
        assert result.pop("changed_flags") == other
        assert (result == trained) == (other == {})
        made = {path.with_suffix(kind) for kind in (".json", ".png", ".webp")}
        assert contents(a_run).keys() - before == made
        assert before.items() <= contents(a_run).items()
        for path in made:
            path.unlink()
    assert len(result["returns"]) == 1
    refusal = OSError(30, "Read-only file system", str(a_run))
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=refusal))
    assert run_main("--eval", a_run, "--final-games", 1) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith("Pong: ")
    assert len(re.findall(f"^iris.py: not written: .*{a_run}", captured.err, re.MULTILINE)) == 3
    assert contents(a_run) == before


def test_loss_that_is_not_finite(tmp_path, capfd, monkeypatch):
    """A loss beyond all numbers stops the run with code 2 and a line; the last good epoch stays."""
    cross_entropy = F.cross_entropy  # which the world model's loss is made of
    monkeypatch.setattr(F, "cross_entropy", lambda *batch: math.nan * cross_entropy(*batch))
    assert run_main(*TINY, *SCHEDULE, "--run-dir", tmp_path) == 2
    assert "token_loss is nan in epoch 2" in error_of(capfd)[0]
    (folder,) = tmp_path.iterdir()
    assert len(iris.read_checkpoint(folder)["history"]) == 1


def test_full_disk(a_run, capfd, monkeypatch):
    """A disk that is full: the run stays as it was, without half of a checkpoint, and how to go on is said."""
    before = contents(a_run)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    assert run_main("--resume", a_run, "--epochs", 5) == 2
    line, flags = error_of(capfd, hint=True)
    assert "No space left" in line
    assert flags == [f"--resume={a_run}"]
    assert contents(a_run) == before


# ---- Pictures ------------------------------------------------------------------------------------
@torch.no_grad()
def test_pictures_show_what_the_model_says(tmp_path, monkeypatch):
    """The film: real, decoded, dreamt with the actions played; the picture: a dream where something is paid."""
    args, agent = bold_agent()
    game = iris.Game("Breakout", 0)
    replay = iris.Replay(args)
    for i in range(40):
        replay.record(game, i % 4)
    frames, actions = replay.frames[:40], replay.actions[:40]
    x = iris.to_network(frames)
    for _ in range(4):
        agent.tokenizer.pick_codes(x)
    tokens = agent.tokenizer.encode(x)
    decoded = agent.tokenizer.decode(tokens)
    rewards = torch.zeros(40)
    rewards[20] = -2.0

    def side_by_side(images):
        return np.concatenate(list(iris.to_bytes(images)), axis=1)

    monkeypatch.setattr(iris, "imagine", Mock(wraps=iris.imagine))
    iris.write_pictures(agent, args, (frames, actions, rewards), tmp_path / "a")
    inputs = iris.imagine.call_args.args
    known, past, forced = inputs[-3:]
    torch.manual_seed(args.seed)  # the same dreams once more
    dreamt = iris.imagine(*inputs)["frames"]
    _, film = cv2.imreadanimation(str(tmp_path / "a.webp"))
    film = [image[1::3, 1::3, 2::-1].astype(float) for image in film.frames]
    assert len(film) == 36
    for i in range(36):
        first = i - i % 3  # each dream knows three frames, and goes on for three
        same(known[i // 3], tokens[first : first + 3])
        same(past[i // 3], actions[first : first + 2])
        same(forced[i // 3], actions[first + 2 : first + 5])
        shown = torch.stack([x[i + 3], decoded[i + 3], dreamt[i // 3, i % 3 + 1]])
        error = np.abs(film[i] - side_by_side(shown))
        assert error.mean((0, 1)).max() < 10  # in each colour; WebP may lose something
    picture = cv2.imread(str(tmp_path / "a.png"))[2::4, 2::4, ::-1]
    # The seventh dream, from its last known frame on.
    rows = [side_by_side(images) for images in (x[20:24], decoded[20:24], dreamt[6])]
    assert np.array_equal(picture, np.concatenate(rows))


# ---- Refusals ------------------------------------------------------------------------------------
# Flags that are refused by their own name, which comes first; RUN is a whole run, FILE is a file.
REFUSED = """--seed 1764057600123456789 | --seed -1 | --seed one | --epochs 0 | --epochs 1.5 | --epochs | --epoch 3
    | --collect-steps -5 | --tokenizer-updates -1 | --actor-critic-batch 0 | --eval-every 0 | --final-games 0
    | --vocab-size 0 | --learning-rate -1 | --learning-rate inf | --entropy-coef -0.1 | --temperature nan | --width 33
    | --gamma nan | --gamma 1.1 | --td-lambda 2 | --epsilon 1.5 | --dropout -0.1 | --weight-average 2 | --context 5
    | --horizon 7 | --horizon 1 | --tokenizer-start 3 | --world-model-start 4 | --tokens-per-frame 32 | --preset large
    | --device tpu | --env= | --env ALE/ | --play RUN | --eval | --eval RUN --resume RUN | --env Breakout --eval RUN
    | --preset paper --eval RUN | --final-games 0 --eval RUN | --layers 3 --resume RUN | --seed 2 --resume RUN
    | --collect-epochs 1 --resume RUN | --epochs 3 --resume RUN"""
REFUSED = {flags: re.match("[a-z-]+", flags)[0] for flags in " ".join(REFUSED.split()).split(" | ")}
REFUSED |= {  # flags -> what the one line names
    "--env Brekout": "Breakout",
    "--env CartPole-v1": "make_env",
    "--env Mine/Carla-v0": "Mine",
    "--env phys2d/CartPole-v1": "phys2d",
    "--env Pong-ram-v5": "Pong-ram",
    "--perceptual-loss": "no weights for LPIPS (RuntimeError('invalid hash",
    "Pong": "Pong",
    "--run-dir FILE/runs": "FILE",
    "--run-dir TAKEN": "exists",  # two runs never share a folder
    "--resume nowhere": "nowhere",
    "--resume=": "checkpoint.pt",
    "--eval FILE": "FILE",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(flags, whole_run, tmp_path, capfd, monkeypatch):
    """Flags that cannot work: code 2, one line that names them, and no folder or file is left."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(iris, "VGG_URL", (tmp_path / "vgg16-397923af.pth").as_uri())
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    monkeypatch.chdir(tmp_path)
    for name in ("FILE", "vgg16-397923af.pth"):  # whose hash is another
        Path(name).write_text("text")
    Path("TAKEN/Pong__1__now").mkdir(parents=True)
    Path("hub/checkpoints").mkdir(parents=True)
    before = contents(whole_run), set(tmp_path.rglob("*"))
    setting = [] if re.search("--(resume|eval|play)", flags) else [*TINY, *SCHEDULE]
    assert run_main(*setting, *flags.replace("RUN", str(whole_run)).split()) == 2
    assert REFUSED[flags] in error_of(capfd)[0]
    assert (contents(whole_run), set(tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("error", [RuntimeError("STATUS_ALLOC_FAILED"), MemoryError(), NotImplementedError("mat1")])
def test_want_of_memory(error, tmp_path, capfd, monkeypatch):
    """Too little memory is a line and code 2; a mistake in the program keeps its traceback."""
    monkeypatch.setattr(iris, "Replay", Mock(side_effect=error))
    wrong = "mat1" in str(error)
    with pytest.raises(RuntimeError, match="mat1") if wrong else contextlib.nullcontext():
        assert run_main(*TINY, "--run-dir", tmp_path) == 2
        error_of(capfd)  # there is nothing to resume, and so no hint
    assert list(tmp_path.iterdir()) == []


def edit(run, change):
    """Saves a checkpoint again after change(it)."""
    state = iris.read_checkpoint(run)
    change(state)
    torch.save(state, run / "checkpoint.pt")


DAMAGED = {  # what is done to a checkpoint's file
    "no checkpoint": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:90_000]),
    "zeroed": lambda path: path.write_bytes(path.read_bytes()[:90_000] + bytes(9) + path.read_bytes()[90_009:]),
    "a number": lambda path: torch.save(7, path),
    "foreign": lambda path: torch.save({"0.weight": torch.zeros(3)}, path),
    "code in it": lambda path: torch.save(dict(args=tiny_args), path),
}
VERSIONS = {  # or to what it holds
    "unknown flag": lambda state: state["args"].update(magic=1),
    "missing flag": lambda state: state["args"].pop("gamma"),
    "no weights": lambda state: state.pop("agent"),
    "missing weight": lambda state: state["agent"].popitem(),
    "other shape": lambda state: state["args"].update(width=64),
}


@pytest.mark.parametrize("case", [*DAMAGED, *VERSIONS])
def test_damaged_runs(case, a_run, capfd):
    """A damaged or foreign run is refused in a line that names it, and no file is touched."""
    if case in DAMAGED:
        DAMAGED[case](a_run / "checkpoint.pt")
    else:
        edit(a_run, VERSIONS[case])
    before = contents(a_run)
    for mode in ("--resume", "--eval"):
        assert run_main(mode, a_run) == 2
        line, _ = error_of(capfd)
        assert str(a_run) in line
        assert ("missing, damaged, or foreign" if case in DAMAGED else "another version") in line
        assert contents(a_run) == before


# ---- README --------------------------------------------------------------------------------------
README = Path(iris.__file__).with_name("README.md")


def test_readme():
    """Every flag, function, class and file that README.md names exists; --help lists the flags."""
    source = Path(iris.__file__).read_text()
    text = re.sub(r"```python.*?```", "", README.read_text(), flags=re.DOTALL)  # other tests run these
    spans = re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL)

    def words(pattern):
        return {word for span in spans for word in re.findall(pattern, span)}

    flags = words(r"^`(--[a-z][a-z-]+)")
    for line in words(r"iris\.py [^\n`]*"):
        flags.update(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line))
    listed = finish("--help").stdout
    for flag in flags:
        name = flag.replace("--no-", "--")
        assert re.search(rf"{name}\b(?!-)", listed) or flag in SCRIPTS, flag
    for name in words(r"(?:iris\.)?\b[A-Za-z_]+\(\)|\biris\.(?!py)\w+"):
        name = name.removeprefix("iris.").removesuffix("()")
        assert re.search(rf"(def|class) {name}\b|^{name} =", source, re.MULTILINE), name
    for name in words(r"(?<![\w/.-])[a-z_]+\.(?:txt|json|csv|bin|png|gif|webp|mp4)\b"):
        written = name in source or f'"{Path(name).suffix}"' in source  # such as eval.png
        assert written or README.with_name(name).exists(), name


def snippet(name):
    """-> the README's block of Python that begins with the comment `# name`."""
    (found,) = re.findall(rf"```python\n(# {name}\b.*?)```", README.read_text(), re.DOTALL)
    return found


def run_snippet(name, source):
    """Runs it as a program of its own would run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name])
        exec(compile(source, name, "exec"), {"__name__": "__main__"})


def test_snippet_play(monkeypatch):
    """Playing in the dream of the run that comes along: keys act, r begins anew, Esc leaves."""
    monkeypatch.chdir(README.parent)
    assert Path(".github/kungfumaster/checkpoint.pt").stat().st_size < 10_000_000
    monkeypatch.setattr(cv2, "setWindowTitle", Mock())
    monkeypatch.setattr(cv2, "imshow", Mock())
    monkeypatch.setattr(cv2, "waitKey", Mock(side_effect=map(ord, "wasd rwd\x1b")))
    monkeypatch.setattr(cv2, "getWindowProperty", Mock(return_value=1.0))
    run_snippet("play.py", snippet("play.py"))
    assert len({call.args[1].tobytes() for call in cv2.imshow.call_args_list}) > 3


def test_snippet_own_game(tmp_path, monkeypatch):
    """A game of one's own trains, and is scored."""
    source = snippet("own_game.py")
    parse = iris.parse_args
    tiny = [*SMALL, *SCHEDULE, "--run-dir", str(tmp_path)]
    monkeypatch.setattr(iris, "make_env", iris.make_env)  # which the snippet may replace
    monkeypatch.setattr(iris, "parse_args", lambda argv=None: parse([*(argv or sys.argv[1:]), *tiny]))
    with contextlib.suppress(SystemExit):
        run_snippet("own_game.py", source)
    (folder,) = tmp_path.iterdir()
    assert len(json.loads((folder / "eval.json").read_text())["returns"]) == 2


def test_snippet_scores(tmp_path, monkeypatch):
    """The normalised scores that rliable gets, (seeds, games), are those by hand."""
    source = snippet("scores.py")
    rliable, matplotlib = Mock(), Mock()
    rliable.library.get_interval_estimates.return_value = dict(iris=0), dict(iris=0)
    for module, stub in (("rliable", rliable), ("matplotlib", matplotlib), ("matplotlib.pyplot", matplotlib.pyplot)):
        monkeypatch.setitem(sys.modules, module, stub)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished run"):
        run_snippet("scores.py", source)
    results = ("Pong", 14.6), ("Pong", -20.7), ("Hero", 1027), ("Hero", 30826.4)
    for number, (game, mean) in enumerate(results):
        path = tmp_path / f"runs/{game}__{number}/eval.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(dict(game=game, mean=mean)))
    run_snippet("scores.py", source)
    scores = rliable.library.get_interval_estimates.call_args.args[0]["iris"]
    close(sorted(scores.T.tolist()), [[0, 1], [1, 0]])
    assert matplotlib.pyplot.barh.call_args.args[1] == [0.5, 0.5]


# ---- Parity with the authors' implementation -----------------------------------------------------
# Their networks were filled by a rule instead of trained, and their outputs written down: whoever gets the same numbers
# computes the same functions. "shapes" are those of a checkpoint for 6 actions. Packed: json, lzma, base 85.
PACKED = """
0ssI30RR90|NsC0{{TIR&^ZR2Z~6U3Gv>{r(}Hh%=g>ZsRFiy6a!U44OnjG14hl227yYl9J#A~nLg5+Bq)$sHo`={oJK+53bS)oTFKrHcb&nU#*~xxYHR(ZWGm1ibw%Q*VTKc&5d+r?eR)r(H)r2^EGZuhTMT}f6d9qU?nH^1U9UAwT$lGK4n0#G!Ys*Ynx64#Vv-`^NV8`SegJUw09jI)sky9s6&$Shj90NQ}id?7E$E*`lizXnG+mv9wL}#hs4!I^fVb<mMGRSFgnavic9&G_UxYx8i(z4$R$a(<r<L^<c_+;xZ)Aprd9-J^8t%rmVvOgZB4BJ9n_ZAs%$wxELsq8|b*y#?|LQL9a#OK*w+mQ)F&{i2xGG3ftl3I>*;=_KMVQE<Hm!su@yZUi<IcsLwZdiEA91MUNOE{6tM#))bKWsPU@)KqUyI|$QgYu+Wv?=f3=>}vk$3wg~DsGJr)Ex55r(;<hi|)|sv5+f3hPDLZ>~)q`Iw19P?w5mefw-n@bJwv!+9al|0mSm9EFU9$<7KXPPI+*n(UcrA#1H<e{X?A`x$DEBPZ#k=Sh{x3+oRuBi|F!zA$G5*Y2C-0R9fX6lK|s#CEh+IrN8kdph6ww$VxQBD~kv&k`<*c4Z=Gr38E;7MuFy7b?Z%#43|drgLAKgkS5gzdP2x?hrn$%vCLvfa6BXoPWiaB_h**_M1RppgBZMYzhNs1eMqe}&YEm6r*>BCbpT0ig)}`FD8>_g!o$6=49jdLz<`1tf=Ua(&wK_*!-0m}qTVS{Vj^4VoSh2PNQigeLGBkfTg3YtyF~*F9rP7dNh7kKtxjk}Vc|M&K&hhHzzr&-cpe2D)DQox=b!qL?gz^U7M{cob@%X(t}SXO(0vXcwa#aM)43tY;e0%+l=pHm)&iTqZ{|2C3>_Y9c5J<4vHa5UmMVniW6he6+PeX#7wM}Ci(0J)FGa)IT#%<0xn5Dj-R`gt{81Tilc9$blJjyh*O|Arf%YTxz(eg`;Ei5JMN)p`f3HcI?+yXK$3Vod9e-+p=mafXRk(WB*YmHn?6xm(%_zyp;6hVlQzwS5GbR{KsSU#nLaf>J@D+-&wUu$@o-AqdrdhtNcemDXX{7<cc;eqvWOdm^DQR?(r`12|Qx{$hpn1hZ7z%?LnY^Nt>bu()1750Vbt!Aa5&1}@7iRh|p<ADzhC?Km34-MeISFchW#K}cbzinkW4wFS`=Z+OzF~0rTq;s2F4*A%9tcf=V+WzxF!W^^szYyf0p-XS^59;`Crnl8f+ipfBhBNNZYYE@P#IUj-*78*DzK~H(J0S&AviVmwSerolcH>oBGWXX>dD_W-VB!osD-J2o!sf^FLe<XLV@BW`YGR$g?TkXXAOg&aTasFq{)xq<IbgE&h-M;jGtLAHwXGLc#aAp+v-!7d$ncr#5lSlb)|-(4&usUsbWAO^R-H1UEPV+481_<m#0x6@(n1%@IcmLd;59!hD}N_1KcSVw<+V<{SXzqj@hQ%eu2*z4tji?3I#-ob#0Jx8}tci@t)jzj5149y(I4(_BHAnXICiw-;C)R8(Qk&8ikG4%2=SSc3nWtBPFc^VFy;UAi|}10IC0pRm2)yzmd4P#&*vIZ(3<yxFqopmKnED|8hNJ!+GI_gN#c&6Aq(U^kn?)GaH=z&r{;z){NPqqW<E+!`})D)BlS^Zt?jB7%rV5a>Ws7|5zd=Up*{bd?`~)Q>-mBO1lMg;|Rp`{VNqWHBV<aa%dTk5S^u^@d@^DE;TK&gcD1e-QHiMat9EPZgVaYRUkgi98sghcuXCCz?714OrB->E53EZV>ufWG@SR%_j;Cfa;Y##pH;xS;WyDojs-e{&@yej_(>#HqA!+(`|I<C0h^DNIyQsK({heE1dx368{;-mc-n{=e|t`sRnBw%nFGkncs_6Vb-YRd8f<%MgaKIh(+N||H1T*UfoI10u%ekGe%4}rX@4kzzhfm9*hv6C+YKm#!V^s#U!96(XnI33MvXY2;#Bw}MS9cLj9{*ZuK%4tMS|qsr%SQw>{zm<$)5lm%vgnJq2`rX)&SG5m+%h!U@B%>yFq3E(OO3{{gPR<vY}c>uMyP_-<748&AjrH(RQrhI@B?RziKUT#neDIsFt?me!H*ZU#AqD3|n5^1tnyp$rfMdI@L>}K8&p_ltFw8A1_jMH8fBua|71)&f^zg!$d;czshcZ$EWxcZOhSV#cl5k%w`$<6D>8^ikb>)XV_sgl2IS<W0Lwh9Wux*FnJDzC+mKr0(-b<AYc#-%)2Y@nTE|0wYpYEa$3V>IM}v6x33E{q${~3<pRu^*IneXan=cj@`Kk!03Db?-jABip!?3=rH{iMp>L$$!M`dbN%@V3?36;~;#!Q^V`a}fidH<Z3Uo)NZv-|-m`%F7!>993)`AMGbmP<tuuTfHVK@`6KaKTT^Juo}1*i<}4u@%5!p{R-G?&^?Y<Xbv#1eA)th(n33z!9Ny<0-d1!^zJpIT=#<qQ=RUzzvM9NRHE-BY#MY1hZZO>iEDn!_I?TWQgog5A{|hYCkGT~?!?W1Q*n3&YkHhlEN5OC)|!c{_mcd*nG>`{*>8;DrCWrXNUz2tk|2ZY{u$)Ns)_QIOACwg@SlZmEiV-+r(Y$f9yB1~5i}C_+q{aTo81fod-~!n$U%pfzsZ1y!=R?BqCq&x&w06KlSxR-{Cy+8po}>O4=5Y)D=}9?BaV$wddfvkT}PqZ3zJT$r*3<8uDef&)(!E-5JrI<#JYFMK@;uj^ut{dKdk=)<{f$+X5g(QZ3|(#LVSO}+b+BP`h_%^pJG!nry*W;!m#MS6D&i?pEATe~dFx6ir>z=ZES9yv^|-7^b?H|D@s-eRVz%9jRq`;2fOrx4s`jK?%(|F^vTvYF<xvIZt&mvPBvsxRa1T+op!k<|+qzc*ZYRsfqlYMY6w8JXqlo4BZ|C0xYyKN?2_0{x#TIZ@&=M$(-}QTxoZ_Fq4v=4fIVv;G$v_GCN>@XWCB5ld>{J!Lt-xVWJFx1ZgWLaBMGO0dBqUVoIMhk|UT!s-%}TDLH0nralb;4dTvifNxSb|y?a&Eje<^-?q$THG>NIi4}^r#R}1ztUEg$rg2kVC5(^z;mSB@hmN_s33HAf2kZkd}wku%yDqv|8m;QW`}9M7%hN33*Cl+WZ})K=EyV?LSpzVSHG_by1UX*i((oT^L$q(W|af4w&I3jG)K3Q@*!oO`xZ!QAG=oZ_!iy}MgBPZ%NM+O$>kG{KzcdPPql5c<%K|nc%TD7o6>BMx3O7|EnA^*=PS?h+|ftwxn?@c8o!tWUZlAxR}e7IX$3lL#xvb!D!vLFv#3>mtfGJS>Z@%=-RoZ+9sxtf9Uqs|RrJ=R8-$#N1B>qkKIc72xvU8>vq(}k*G5(@PG%OI$BvC9rV5F=k^;VxV5ahM0}0{CaX_^~mYU(xUv+Bp7Z<e1`9`KynASs&KIP=a#_dns144IdKtUAblETdl#a@YbQ&yHkgTlnRm3kgt5RYt%8XUVt2=!);Z3UIdC%gEzf-RgWupq}d``q<M6sF{}eD*~`O%<Y1787z)alCre*$>1eh08386k@5uNw#rW#5c3w*!ZpdA{`c({IDS$(=D!#KKmG^I<Z=Pf)!P;^T%rfJqT2P<caM`h`p&Eg2K~Ap(sc-57~FkDpMdFzwfYRW<N5<W>UU|jwh#sJQDR>LzTYRM90G3o;)lrPp0vF?O*qI@es#INsktNh^NiM0pX4vJx&W>pNw>E=-A#LM*jNUCXI<-)P^$?V;!C<`TXCh&9yQBd;NAI69RGw=r9V5n)3p19Cik-p2P@}4;(Bj(d)^Ubx2A7#LuHPJtv8q=Hf{7h1t2PL^ntD<>E^=stO590gs~bb@|lc1heJa&0aUZKtL%={vfXQC}yad*1^EN!lq0B(*={`UD#Tmwso4kg2O^R>3EN-g?<N24}2p|0rs@@vlUI_f5+VT(!$sKY3o=l+yh{ZtlDU^?+8Wz!?4v4CeQlvskQa~{xH>=L(%&L+?w>aA%vtkoRnrsqXw8b!X6{oRD0sa96Hus&sn(i00{^0x@`d}p9p=XqXE*vz1eE!9R&UX0j<6R3&DO!v5iSRz9D5+F`0ViyHC6UU%o6~4fFV(<$i#LL{qDvEdeU#Q2aGwM(_plJ~{b!a=Za>8~l5(!{n9T+K#R+#?@Fk%;^^k0u39MT2qLMlP_>OLcsO>7T&r94~(i%J@;=KT<V-EF5|W(M^;T2oi~_}A1TQBa=32tr%cF=loHg-z@(9l=)UtxEs5w2bEW~1dGtFN){s*pdhfTQ=Wczuh)zWObmx^SGZxk<^YBP;V@rXgOJt{B$MCv4Ups&{=*sDKsXOs=aEaDdmZ<r_3cw`>{pXNZi@@xTE7)l)lZYqj<Xz3wKe=Mci~N050ECyOVfS6)$SitYdti1%i8Vm*f_oMcLJPe%oB|pfRWkyuCXDq_7zLiUe)>-y+GV)xwwXX(D(o1yUNFj<A3K&5iLh|Ge8G$vAT<TY=e0FGUaF8R!AGtY3*EaynvhGJ6;$mmcWp3u;`=d1Q$e0b;KEU{w>i@T7!Y@C07vX2T+13+Jb{0FQ4s`n%PSg8M${G&Ow(4Yhlx}?k_b<aa%8D4qO`L_w~qJhCLq}PgS%SsD|g+$@{G$*E7_{U%l~iF$Cyrp78p}I8HDK5u`hU|O^D;&Mb_lONM|QJ8MBARl|fUsM=-y#2g6T^G%cNFKx}Za5z-{wZv7oEuH)83ObH8?*Ae2LdOGcxgyD`52R0q4zQplsVzZmhXpSp51l|O+`<J7os;sX4Ly~Md)yI{VU#gyxF+w&iKJTyH?hF`qU#95XX+}rN^Gov6lG}S9ZM7RW$G<$#PrY<YczkpV{F8W>WXV=2kFOLrZwA5nW>G?7UJ?rQpm3BD^FZ~F?EmLc^aJ&)6Cc2(MBCJ8{dQhM)oWKgN@oZ9CnS5LX##`*8pDI&Iblhd`z~uskryu4Sc_W<pLJ-9ySwRu;B$4a(Z7l~=#am}VxE+DT3;8}xz=sWv6i(mx{`GnQj}Mh+<{|b+TJU%N3Vou+s|4ZG{Wa_ec`WR=uzUJ`{1>&<wJE{-@0LzdvovW+;r8{cm(fbdu61jgW>ke*#TBQwdsfWHi0gs*0ur&6o{Li8n&vM7`u5Hnmv<JL!&!R?Wwx-7FT$JmT6LUr3Sj{%>eP^k7=a`pc1-S2W~`b$RkKV9qongyj}5i3c>{fbMg(v^3`&SFcAA^8|`D*|7;zIhTE8qMe>T{g{zqL=0&Q8#PJx9|4BT)00
"""


def fill(name, shape):
    """The rule."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    x = rng.standard_normal(math.prod(shape)).reshape(shape)
    embedding = name.endswith(("embedding.weight", "pos_emb.weight")) or "embedding_tables" in name
    if len(shape) == 1:
        x = 1 + 0.1 * x if name.endswith(".weight") else 0.1 * x
    elif not embedding:
        x = np.abs(x) if "lpips.lin" in name else x
        x = x / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


def authors_layers():
    """The authors' names of our encoder's and decoder's layers, those with weights, in our order."""
    middle = ["mid.block_1", "mid.block_2"]
    encoder, decoder = ["conv_in"], ["conv_in", *middle]
    for i in range(5):  # resolutions 64, 32, 16, 8, 4
        encoder += [f"down.{i}.block.{j}" for j in range(2)]
        encoder += [f"down.{i}.downsample.conv"] * (i < 4)
    for i in reversed(range(5)):
        decoder += [f"up.{i}.block.{j}" for j in range(3)]
        decoder += [f"up.{i}.upsample.conv"] * (i > 0)
    encoder = [f"encoder.{name}" for name in (*encoder, *middle, "norm_out", "conv_out")]
    decoder = [f"decoder.{name}" for name in (*decoder, "norm_out", "conv_out")]
    return dict(encoder=[*encoder, "pre_quant_conv"], decoder=["post_quant_conv", *decoder])


BLOCK_NAMES = ["norm1", "", "conv1", "norm2", "", "conv2"]  # of a residual block's layers
AUTHORS_NAMES = (  # (pattern in our tensors' names, the authors' names), applied one after another
    (r"block(\.|_)(\d)\.attention", r"attn\1\2"),
    (r"layers\.(\d)", lambda match: BLOCK_NAMES[int(match[1])]),
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


def to_ours(theirs, agent):
    """The authors' state dict -> the agent's."""
    layers = {}  # our names of layers -> theirs
    for part, names in authors_layers().items():
        places = [i for i, layer in enumerate(getattr(agent.tokenizer, part)) if list(layer.parameters())]
        for i, name in zip(places, names, strict=True):
            layers[f"{part}.{i}."] = f"{name}."
    converted = {}
    for ours in agent.state_dict():
        name = re.sub(r"(en|de)coder\.\d+\.", lambda match: layers[match[0]], ours)
        for pattern, replacement in AUTHORS_NAMES:
            name = re.sub(pattern, replacement, name)
        parts = [""]
        if "qkv" in name:  # our one matrix is three of theirs
            parts = ["query", "key", "value"] if "transformer" in name else ["q", "k", "v"]
        converted[ours] = torch.cat([theirs[name.replace("qkv", part)] for part in parts])
    return converted


@pytest.fixture(scope="module")
def golden():
    """What the authors' code computes, of what, and with which weights."""
    golden = json.loads(lzma.decompress(base64.b85decode(PACKED.strip())))
    blocks = torch.tensor(golden["observations"]["blocks"], dtype=torch.uint8)
    frames = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)
    golden["x"] = iris.to_network(frames)  # two images of coloured blocks
    text = torch.tensor(golden["world_model"]["tokens_flat"]).view(2, 20, 17)
    golden["text"] = text[..., :16], text[..., 16]  # tokens and actions of 20 steps
    weights = {name: fill(name, shape) for name, shape in golden["shapes"].items()}
    assert len(weights) == 609
    # Theirs hold buffers, too, which carry nothing.
    weights["world_model.transformer.blocks.0.attn.mask"] = torch.ones(3)
    golden["weights"] = weights
    return golden


@pytest.fixture(scope="module")
def paper(golden):
    """The paper's agent, with as many parameters as theirs, and those weights."""
    args, _ = iris.parse_args("--preset paper --device cpu --no-mixed-precision".split())
    agent = iris.Agent(args, 6)
    counts = [sum(p.numel() for p in network.parameters()) for network in agent.children()]
    assert counts == [4_027_523, 8_448_005, 3_218_983]
    agent.load_state_dict(to_ours(golden["weights"], agent))
    return agent


@pytest.fixture
def hub(golden, tmp_path_factory, monkeypatch):
    """A torch home whose cache holds their LPIPS."""
    home = tmp_path_factory.mktemp("torch")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    vgg = {"classifier.0.weight": torch.zeros(2)}  # torchvision's file has such ones too
    heads = {}
    for name, x in golden["weights"].items():
        if ".lpips.net." in name:
            vgg[re.sub(r".*slice\d", "features", name)] = x
        elif ".lpips.lin" in name:
            heads[name.removeprefix("tokenizer.lpips.")] = x
    torch.save(vgg, folder / "vgg16-397923af.pth")
    torch.save(heads, folder / "lpips_vgg-a78928a0.pth")
    monkeypatch.setenv("TORCH_HOME", str(home))


@torch.no_grad()
def test_parity_tokenizer(paper, golden, hub):
    """Latents, tokens, reconstructions and losses are theirs, with LPIPS from torch hub's cache."""
    expected = golden["tokenizer"]
    x = golden["x"]
    z = paper.tokenizer.encoder(x)
    close([z.mean(), z.std()], [expected["z_mean"], expected["z_std"]])
    tokens = paper.tokenizer.encode(x)
    assert tokens.tolist() == expected["tokens"]
    drawn = (paper.tokenizer.decoder(paper.tokenizer.embed(tokens)) + 1) / 2
    picture = expected["reconstruction_in_0_1_before_clamp"]
    close(drawn[0, 0, 0, :16], picture["first_row_red"])
    close([drawn.mean(), drawn.std()], [picture["mean"], picture["std"]])
    losses = expected["losses"]
    loss, metrics = paper.tokenizer.loss(x, iris.load_lpips("cpu"))
    close(2 * metrics["commitment"], losses["codebook_plus_commitment"])
    close(metrics["reconstruction"], losses["reconstruction_l1"])
    close(loss, sum(losses.values()))
    close(loss - paper.tokenizer.loss(x)[0], losses["perceptual"])


@torch.no_grad()
def test_parity_world_model(paper, golden):
    """Logits and losses, with padding, are the authors'."""
    expected = golden["world_model"]
    losses = expected["loss"]
    rewards, ends, valid = (torch.tensor(losses[name]) for name in ("rewards", "ends", "mask_padding"))
    token_logits, reward_logits, end_logits = paper.world_model.predict(*golden["text"])
    close(token_logits[:, -1, :8], expected["observation_logits_last"])
    close(token_logits.std(), expected["observation_logits_std"])
    close(reward_logits[0, [0, 9, 19]], expected["reward_logits"])
    close(end_logits[1, [0, 9, 19]], expected["end_logits"])
    loss, metrics = paper.world_model.loss(*golden["text"], rewards, ends, valid.bool())
    close(metrics["token_loss"], losses["observations"])
    close(metrics["reward_loss"], losses["rewards_ce"])
    close(metrics["end_loss"], losses["ends_ce"])
    close(loss, losses["observations"] + losses["rewards_ce"] + losses["ends_ce"])


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
def test_parity_actor_critic(mixed, paper, golden):
    """Five steps, images moving by 8 pixels, are theirs; in bfloat16 nearly so, but the memory."""
    state = paper.actor_critic.initial_state(2)
    steps = golden["actor_critic"]["steps"]
    assert len(steps) == 5
    tolerance = 0.01 if mixed else 1e-4
    for t, expected in enumerate(steps):
        seen = golden["x"].roll(8 * t, dims=-1)[:, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits, values, state = paper.actor_critic(seen, state)
        assert state.dtype == torch.float32
        close(logits[:, 0], expected["action_logits"], 0, tolerance)
        close(values[:, 0], expected["values"], 0, tolerance)


def test_parity_lambda_returns(golden):
    """The authors' returns, with an end in one row."""
    expected = golden["lambda_returns"]
    names = "rewards values ends returns".split()
    rewards, values, ends, wanted = (torch.tensor(expected[name]) for name in names)
    returns = iris.lambda_returns(rewards[:, :-1], values, ends[:, :-1], expected["gamma"], expected["lambda_"])
    close(returns, wanted[:, :-1])  # their last one is the last value


def test_parity_checkpoint_plays(golden, hub, tmp_path, monkeypatch, capfd):
    """Qbert.pt, converted, plays Qbert; it cannot be resumed, and does not fit a game of 18 actions."""
    run, path = tmp_path / "official", tmp_path / "Qbert.pt"
    torch.save(golden["weights"], path)
    convert(path, run)
    short_games(monkeypatch)
    flags = ["--device", "cpu", "--no-mixed-precision", "--final-games", 1]
    assert run_main("--eval", run, *flags) == 0
    assert capfd.readouterr().out.strip().splitlines()[-1].startswith("Qbert: ")
    before = contents(run)
    assert run_main("--resume", run, "--device", "cpu") == 2
    assert "only weights" in error_of(capfd)[0]
    assert contents(run) == before
    with pytest.raises(SystemExit, match="Klax.*18"):
        convert(path, tmp_path / "klax", "Klax")
    assert not (tmp_path / "klax").exists()


# ---- Scripts: what is measured and not asserted --------------------------------------------------
def load_agent(run):
    """A run's folder -> flags, agent, on the CPU."""
    args, checkpoint = iris.parse_args(["--eval", str(run), "--device", "cpu", "--no-mixed-precision"])
    agent = iris.Agent(args, iris.Game(args.env, 0).num_actions)
    iris.load_weights(run, checkpoint, agent)
    return args, agent


def convert(path, run, game=None):
    """--convert Pong.pt RUN [GAME]: the authors' weights, of the game that the file is named after, as a run."""
    args, _ = iris.parse_args(["--preset", "paper", "--env", game or Path(path).stem])
    num_actions = iris.Game(args.env, 0).num_actions
    agent = iris.Agent(args, num_actions)
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        agent.load_state_dict(to_ours(theirs, agent))
    except Exception as error:  # a foreign file, or another game's
        sys.exit(f"{path} does not fit {args.env}, which has {num_actions} actions: {str(error)[:150]!r}")
    flags = vars(args)
    del flags["resume"], flags["eval"]  # a checkpoint has all the others
    checkpoint = dict(args=flags, history=[], agent=agent.state_dict())
    Path(run).mkdir(parents=True)
    torch.save(checkpoint, Path(run) / "checkpoint.pt")
    print(f"python iris.py --eval {shlex.quote(str(run))}")


@torch.no_grad()
def health(run):
    """--health RUN: what the networks know, on the first 300 steps of a real game that the policy plays."""
    args, agent = load_agent(Path(run))
    _, recording = iris.play_games(agent, args, 1)
    T = min(args.sequence_length, len(recording[0]))
    count = len(recording[0]) // T  # segments; what is left at the end is not used
    frames, actions, rewards = (x[: count * T] for x in recording)
    x = iris.to_network(frames)
    tokens = agent.tokenizer.encode(x)  # (count T, K)
    # What moves is a small part of a frame: a good mean error can hide that it is all missing.
    error = (agent.tokenizer.decode(tokens) - x).abs()
    contrast = (x - x.median(dim=0).values).abs()  # the error if only the background were drawn
    moving = contrast > 0.2
    print(f"{1 - error[moving].sum() / contrast[moving].sum():.1%} of the contrast of what moves is drawn")
    # The least a world model must beat: "each token stays what it was a frame ago". It has an easier
    # task, since it is given all real tokens before the one it predicts, even those of the same frame.
    tokens = tokens.unflatten(0, (count, T))
    logits, signs, _ = agent.world_model.predict(tokens, actions.unflatten(0, (count, T)))
    # Prediction i is about token i + 1, so that K - 1 is the first about the second frame.
    right = logits[:, tokens.shape[2] - 1 : -1].argmax(-1) == tokens[:, 1:].flatten(1)
    copied = tokens[:, :-1] == tokens[:, 1:]
    print(f"{right.float().mean():.1%} of the tokens are predicted, {copied.float().mean():.1%} are as before")
    # Rewards are rare: a model that never predicts one has a low loss, but teaches nothing.
    chances = signs.softmax(-1).flatten(0, 1)
    foreseen = (chances[:, 2] - chances[:, 0]).round()
    paid = rewards != 0
    right = (paid & (foreseen == rewards.sign())).sum()
    print(f"{paid.sum()} rewards are paid, {(foreseen != 0).sum()} foreseen, {right} of these rightly")


def baselines(name):
    """--baselines GAME: whole games of random play and of each constant action."""
    args, _ = iris.parse_args(["--env", name, "--device", "cpu"])
    meanings = gymnasium.make(f"ALE/{args.env}-v5").unwrapped.get_action_meanings()

    def act(choices, frames, state, temperature):
        return choices[torch.randint(len(choices), (len(frames),))], state

    players = dict(random=torch.arange(len(meanings)))
    for action, meaning in enumerate(meanings):
        players[meaning] = torch.tensor([action])
    for label, choices in players.items():
        games = 30 if label == "random" else 3  # the emulator has no luck: these three are the same
        scores, _ = iris.play_games(Mock(act=partial(act, choices)), args, games)  # a player without a memory
        interval = 1.96 * scores.std(ddof=1) / math.sqrt(games)
        print(f"{args.env}, {label:13} {scores.mean():9.1f} +- {interval:.1f} (95 %)", flush=True)


def kills(count):
    """--kills N: a run killed N times at random moments, against one that was not."""
    flags = [*TINY, *SCHEDULE, "--epochs", "499", "--eval-every", "499"]
    whole, killed = (Path(tempfile.mkdtemp()) for _ in range(2))
    assert finish(*flags, "--run-dir", whole).returncode == 0
    start = [*flags, "--run-dir", killed]
    for _ in range(int(count)):
        process = subprocess.Popen(command(*start), stdout=subprocess.DEVNULL)
        while not list(killed.glob("*/checkpoint.pt")):  # without one there is nothing to resume
            time.sleep(0.02)
        time.sleep(random.uniform(4, 8))  # it takes some three seconds to start
        assert process.poll() is None  # so there is something to kill
        process.kill()
        process.wait()
        start = ["--resume", next(killed.iterdir())]
        epochs = len((start[1] / "metrics.csv").read_text().splitlines()) - 1
        print(f"killed after {epochs} whole epochs", flush=True)
    assert finish(*start).returncode == 0
    assert read_run(next(killed.iterdir())) == read_run(next(whole.iterdir()))
    print(f"{count} kills: the run equals the one never stopped, to the last bit")


def plain_updates(agent, optimizer, replay, args):
    """Updates as one writes them first: float32, all that is drawn is encoded again, dreams without a cache."""
    plain_agent, plain_replay, plain_args = copy.copy(agent), copy.copy(replay), copy.copy(args)
    plain_args.mixed_precision = False

    @torch.no_grad()
    def sample(*inputs, **options):
        index, valid = replay.sample(*inputs, **options)
        drawn = index.flatten()
        replay.tokens[drawn] = agent.tokenizer.encode(iris.to_network(replay.frames[drawn]))
        return index, valid

    @torch.no_grad()
    def dream(frames, valid, tokens, actions):
        state = agent.actor_critic.initial_state(len(frames))
        _, _, state = agent.actor_critic(frames[:, :-1], state, valid[:, :-1])
        past = tokens[:, -1:], actions[:, :0], frames[:, -1]
        return naive_dream(agent, *past, state, args.horizon - 1, draw=iris.sample) | dict(state=state)

    plain_replay.sample = sample
    plain_agent.dream = dream
    flow = plain_agent, optimizer, plain_replay, plain_args, {}
    return {name: partial(getattr(iris, f"train_{name}"), *flow) for name in ("world_model", "actor_critic")}


def benchmark(*flags):
    """--benchmark [iris.py's flags]: each phase of an epoch, ours beside a plain one."""
    args, _ = iris.parse_args([*flags, "--no-perceptual-loss"])
    torch.set_num_threads(THREADS)
    args.tokenizer_updates = args.world_model_updates = args.actor_critic_updates = 1
    replay = iris.Replay(args)  # as large as training's, for the peak of memory
    args.collect_steps = 1280
    game = iris.Game(args.env, 0)
    agent = iris.Agent(args, game.num_actions)
    optimizer = iris.make_optimizer(agent, args.learning_rate)
    iris.collect(agent, game, replay, args)
    iris.tokenize_replay(agent, replay, args)

    def tokens():
        replay.tokenized = 0
        iris.tokenize_replay(agent, replay, args)

    def dream():
        index, valid = replay.sample(args.actor_critic_batch, args.burn_in + 1, "end")
        last = index[:, -args.context :]
        frames = iris.to_network(replay.reconstructions[index])
        agent.dream(frames, valid, replay.tokens[last], replay.actions[last[:, :-1]])

    def milliseconds(work):
        times = []
        for _ in range(4):  # the first warms up: allocators, autotuning, CUDA graphs
            begun = time.perf_counter()
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return 1000 * np.median(times[1:])

    flow = agent, optimizer, replay, args, {}
    ours = dict(tokenizer=partial(iris.train_tokenizer, *flow, None), tokens=tokens)
    ours["world_model"] = partial(iris.train_world_model, *flow)
    ours["dream"] = dream
    ours["actor_critic"] = partial(iris.train_actor_critic, *flow)
    plain = plain_updates(agent, optimizer, replay, args)
    if args.preset == "small":  # its codes are picked, once an epoch, and not trained
        ours["tokenizer"] = partial(iris.adapt, agent, replay)
    print(f"{args.env}, {args.preset} preset, {args.device}, {torch.get_num_threads()} threads")
    for name, work in ours.items():
        quick = milliseconds(work)
        line = f"  {name:12} {quick:10.2f} ms"
        if name == "dream":
            line += f", {1000 * args.actor_critic_batch * (args.horizon - 1) / quick:.0f} imagined frames a second"
        if name in plain:
            slow = milliseconds(plain[name])
            line += f", plain {slow:10.2f} ms, {slow / quick:.2f} x"
        print(line, flush=True)
    if args.device == "cuda":
        print(f"  {torch.cuda.max_memory_allocated() / 1e9:.2f} GB, plain included")


SCRIPTS = {f"--{script.__name__}": script for script in (convert, health, benchmark, baselines, kills)}
if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        sys.exit("tests: python -m pytest test_iris.py; scripts: python test_iris.py " + " | ".join(SCRIPTS))
    SCRIPTS[sys.argv[1]](*sys.argv[2:])
