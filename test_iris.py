# SPDX-License-Identifier: MIT
"""Tests of iris.py, each against something independent: a naive loop, the emulator, the authors' numbers.

python -m pytest test_iris.py    some minutes on two cores; needs neither a GPU nor a network
"""

import base64
import contextlib
import csv
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import zlib
from functools import partial
from pathlib import Path

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
TINY = """--preset small --env PongNoFrameskip-v4 --device cpu --no-mixed-precision --layers 1 --width 32
    --vocab-size 32 --policy-size 16 --lstm-size 16 --sequence-length 6 --horizon 5 --context 2 --burn-in 4
    --dropout 0.1 --collect-epochs 1 --collect-steps 300""".split()


def tiny_args(*flags):
    """The flags of a tiny agent; more flags override."""
    return iris.parse_args([*TINY, *flags])


def close(actual, expected, rtol=1e-3, atol=2e-6):
    """Asserts that two tensors, numbers or lists are equal but for rounding."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def bold_agent(args):
    """An agent whose outputs depend strongly on its inputs; those of fresh networks hardly do."""
    torch.manual_seed(0)
    agent = iris.Agent(args, 6).eval()
    with torch.no_grad():
        for network in (agent.world_model, agent.actor_critic):
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        agent.tokenizer.codebook.weight.normal_()
    if args.local_tokens:
        agent.world_model.take_codes(agent.tokenizer.codebook.weight)
    return agent


def random_text(args, batch=2, steps=6):
    """-> tokens (B, T, K) and actions (B, T)."""
    tokens = torch.randint(args.vocab_size, (batch, steps, args.tokens_per_frame))
    return tokens, torch.randint(6, (batch, steps))


def to_pixels(frames):
    """Frames (n, 3, 64, 64) in [-1, 1] -> (n, 64, 64, 3) uint8."""
    return ((frames + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)


def watch_dreams(monkeypatch, change=lambda dreamt: None):
    """-> list that will hold (tokens, past actions, given actions, dream) of every dream."""
    original, seen = iris.imagine, []

    def watched(agent, steps, frames, valid, tokens, actions, given=None):
        dreamt = original(agent, steps, frames, valid, tokens, actions, given)
        change(dreamt)
        seen.append((tokens, actions[:, :-1].clone(), given, dreamt))
        return dreamt

    monkeypatch.setattr(iris, "imagine", watched)
    return seen


# ---- Replay --------------------------------------------------------------------------------------
LENGTHS = (1, 3, 50, 7, 200)  # of the episodes; the last is still running


def filled_replay():
    """Five episodes, whose rewards say at which step of its episode a step is."""
    replay = iris.Replay(tiny_args())
    for length in LENGTHS:
        for t in range(length):
            told = float(t), length < 200 and t == length - 1, None
            frame = torch.full((64, 64, 3), t)
            game = types.SimpleNamespace(frame=frame, opens=t == 0, step=lambda _, told=told: told)
            replay.record(game, t % 5)
    return replay


@pytest.mark.parametrize("drawn", ["first", "last"])
@pytest.mark.parametrize("steps", [1, 6, 21])
def test_segments(drawn, steps):
    """Episodes come up equally often, and their steps; what an episode lacks is invalid."""
    replay = filled_replay()
    assert replay.ends.nonzero().flatten().tolist() == [0, 3, 53, 60]
    torch.manual_seed(0)
    index, valid = replay.sample(20_000, steps, drawn)
    anchors = index[:, 0 if drawn == "first" else -1].numpy()
    counts = np.bincount(anchors, minlength=261)
    owner = np.repeat(np.arange(5), LENGTHS)  # the episode of every step
    wanted = 4000 / np.array(LENGTHS)[owner]
    assert (abs(counts - wanted) < 5 * np.sqrt(wanted)).all()
    for anchor, segment, inside in zip(anchors[:500], index.tolist(), valid.tolist()):
        begin = anchor if drawn == "first" else anchor - steps + 1
        for t in range(steps):
            exists = 0 <= begin + t < 261 and owner[begin + t] == owner[anchor]
            assert inside[t] == exists
            assert owner[segment[t]] == owner[anchor]
            assert segment[t] == begin + t or not exists
    assert steps == 1 or not valid.all()


# ---- Tokenizer -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_tokenizer_loss(kind, monkeypatch):
    """Loss and gradients are a naive version's; the decoder's passes straight to the latents."""
    tokenizer = bold_agent(tiny_args("--reconstruction-loss", kind)).tokenizer
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    z = torch.randn(3, 768, 16, requires_grad=True)
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
        error = d.abs() if kind == "l1" else d**2
        naive = naive + (error + d**4).mean() / 3
    naive.backward()
    gap = (z - z_q).detach()
    close(loss, naive + 2 * gap.square().mean(), rtol=1e-5)
    close(z.grad, z_q.grad + 2 * gap / gap.numel(), rtol=1e-4, atol=1e-7)
    expected = torch.zeros(32, 768)  # the codebook's gradient: codes are pulled to their latents
    for n in range(3):
        for place in range(16):
            expected[tokens[n, place]] -= 2 * gap[n, :, place] / gap.numel()
    close(tokenizer.codebook.weight.grad, expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("flags", ["16", "64", "16 --no-local-tokens", "64 --no-local-tokens"])
def test_nearest_code(flags):
    """Both tokenizers, 16 or 64 tokens: each is the nearest code by brute force."""
    tokenizer = bold_agent(tiny_args("--tokens-per-frame", *flags.split())).tokenizer
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z = tokenizer.encoder(x)
    codes = tokenizer.codebook.weight
    some = z.movedim(1, -1).flatten(0, 1)[:32]
    codes.copy_(some + some.std() * torch.randn_like(some))
    tokens = tokenizer.encode(x)
    embedded = tokenizer.embed(tokens)
    for n in range(2):
        for place in range(z.shape[2]):
            distances = [(z[n, :, place] - code).square().sum() for code in codes]
            nearest = int(np.argmin(distances))
            assert tokens[n, place] == nearest
            assert torch.equal(embedded[n, :, place], codes[nearest])
    assert len(tokens.unique()) > 5
    drawn = tokenizer.decode(tokens)
    assert drawn.abs().max() <= 1
    close(drawn, tokenizer.decoder(embedded).clamp(-1, 1))


@torch.no_grad()
@pytest.mark.parametrize("side", [16, 8])
def test_revived_codes(side):
    """Every square of some mosaics becomes a code, a rare one too; codes in use stay later on."""
    torch.manual_seed(0)
    squares = torch.randint(256, (12, side, side, 3), dtype=torch.uint8)
    choice = torch.randint(9, (100, 64 // side, 64 // side))
    choice[50, 2, 1] = 9  # the rare one

    def mosaics():
        frames = squares[choice].permute(0, 1, 3, 2, 4, 5)
        return iris.to_network(frames.reshape(100, 64, 64, 3))

    x = mosaics()
    number = str(choice[0].numel())
    tokenizer = iris.Tokenizer(tiny_args("--vocab-size", "256", "--tokens-per-frame", number))
    assert (tokenizer.decode(tokenizer.encode(x)) - x).abs().mean() > 0.3
    address = tokenizer.codebook.weight.data_ptr()
    tokenizer.revive_codes(x)
    assert tokenizer.codebook.weight.data_ptr() == address  # CUDA graphs go on reading there
    tokens = tokenizer.encode(x)
    close(tokenizer.decode(tokens), x, 0, 1e-5)
    choice[0, 0, :2] = torch.tensor([10, 11])
    later = mosaics()
    tokenizer.revive_codes(later)
    close(tokenizer.decode(tokenizer.encode(later)), later, 0, 1e-5)
    assert torch.equal(tokenizer.encode(x)[1:], tokens[1:])


def test_lpips_is_refused(tmp_path, monkeypatch):
    """Weights without the published hash are refused, and nothing of them stays in the cache."""
    wrong = tmp_path / "vgg16-397923af.pth"
    torch.save(dict(wrong=torch.zeros(2)), wrong)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(iris, "VGG_URL", wrong.as_uri())
    with pytest.raises(iris.InputError, match="LPIPS.*hash"):
        iris.load_lpips("cpu")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# ---- World model ---------------------------------------------------------------------------------
def test_causality():
    """What is said at a position depends on every position up to it, and on none after it."""
    args = tiny_args("--layers", "3")
    world_model = bold_agent(args).world_model
    x = world_model.embed(*random_text(args)).detach().requires_grad_()
    hidden = world_model(x)
    for position in range(102):
        (gradient,) = torch.autograd.grad(hidden[:, position].sum(), x, retain_graph=True)
        reached = gradient.abs().amax((0, 2)) > 0
        assert reached.tolist() == [i <= position for i in range(102)]


@torch.no_grad()
def test_cached_steps_equal_the_full_pass():
    """A beginning and then single positions, through a cache, give the hidden states of one pass."""
    args = tiny_args("--layers", "3")
    world_model = bold_agent(args).world_model
    x = world_model.embed(*random_text(args))  # 6 x 17 positions: all there are
    full = world_model(x)
    caches = torch.full((3, 2, 2, 4, 102, 8), math.nan)  # what is not yet filled is never read
    close(world_model(x[:, :15], caches), full[:, :15], 1e-4, 1e-5)
    for i in range(15, 102):
        one = slice(i, i + 1)
        close(world_model(x[:, one], caches, i), full[:, one], 1e-4, 1e-5)


@pytest.mark.parametrize("reward_loss", ["cross-entropy", "mse"])
def test_world_model_loss(reward_loss):
    """The three losses are naive ones' means over what may be predicted; padding is in none."""
    args = tiny_args("--reward-loss", reward_loss)
    world_model = bold_agent(args).world_model
    tokens, actions = random_text(args)
    rewards = 3 * torch.randn(2, 6)
    ends = torch.randint(2, (2, 6))
    rewards[:, 0] = 0
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    loss, metrics = world_model.loss(tokens, actions, rewards, ends, valid)
    hidden = world_model(world_model.embed(tokens, actions))
    naive = dict(token_loss=[], reward_loss=[], end_loss=[])
    for b, t in valid.nonzero().tolist():
        h = hidden[b, 17 * t + 16]  # at the action
        prediction = world_model.head_reward(h)
        sign = int(np.sign(float(rewards[b, t])))
        if reward_loss == "mse":
            naive["reward_loss"].append((prediction[0] - sign) ** 2)
        else:
            naive["reward_loss"].append(-prediction.log_softmax(-1)[sign + 1])
        naive["end_loss"].append(-world_model.head_end(h).log_softmax(-1)[ends[b, t]])
        for k in range(16):
            before = 17 * t + k - 1  # the position that predicts token k of step t
            if before >= 0:
                logits = world_model.head_token(hidden[b, before])
                naive["token_loss"].append(-logits.log_softmax(-1)[tokens[b, t, k]])
    total = 0
    for name, losses in naive.items():
        mean = torch.stack(losses).mean()
        close(metrics[name], mean, 1e-5)
        total = total + mean
    close(loss, total, 1e-5)


@torch.no_grad()
def test_pixels_of_local_tokens():
    """A local token is embedded as itself and by its code's pixels, centred and scaled."""
    args = tiny_args()
    agent = bold_agent(args)
    tokens, actions = random_text(args)
    codes = agent.tokenizer.codebook.weight
    pixels = (codes - codes.mean(0)) / codes.var(0, correction=0).sum().sqrt()
    expected = agent.world_model.token_embedding(tokens)
    expected = expected + pixels[tokens] @ agent.world_model.project_pixels.weight.T
    embedded = agent.world_model.embed(tokens, actions).unflatten(1, (6, -1))
    close(embedded[:, :, :-1], expected)


def test_moving_average_of_the_world_model():
    """The world model that dreams is the exponential moving average of the learner's weights."""
    args = tiny_args("--ema-decay", "0.75", "--world-model-updates", "3")
    agent = bold_agent(args)
    weight, mean = agent.learner.pos_emb.weight.data, agent.world_model.pos_emb.weight.data
    expected = mean.clone()
    optimizer = iris.make_optimizers(agent, args)["world_model"]
    optimizer.register_step_post_hook(lambda *_: expected.lerp_(weight, 0.25))
    iris.train_world_model(agent, optimizer, filled_replay(), args)
    assert not torch.equal(mean, weight)
    close(mean, expected)


# ---- Dreams --------------------------------------------------------------------------------------
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
    dreamt = dict(frames=[frame], tokens=[tokens[:, -1]], actions=[], rewards=[], ends=[])
    for t in range(steps):
        logits, _, state = agent.actor_critic(frame[:, None], state)
        action = draw(logits[:, 0]) if actions is None else actions[:, t]
        dreamt["actions"].append(action)
        text = torch.cat([text, world_model.action_embedding(action)[:, None]], dim=1)
        h = world_model(text)[:, -1]
        reward = world_model.head_reward(h)
        if reward.shape[1] == 1:
            reward = reward[:, 0]
        else:
            chances = reward.softmax(-1)
            reward = draw(reward) - 1.0 if agent.draw_rewards else chances[:, 2] - chances[:, 0]
        dreamt["rewards"].append(reward)
        dreamt["ends"].append(draw(world_model.head_end(h)).float())
        words = []
        for k in range(tokens.shape[2]):
            words.append(draw(world_model.head_token(world_model(text)[:, -1])))
            text = torch.cat([text, world_model.token_vectors()[words[k], None]], dim=1)
        dreamt["tokens"].append(torch.stack(words, dim=1))
        z_q = agent.tokenizer.embed(dreamt["tokens"][-1])
        frame = agent.tokenizer.decoder(z_q).clamp(-1, 1)
        dreamt["frames"].append(frame)
    return {name: torch.stack(column, dim=1) for name, column in dreamt.items()}


@torch.no_grad()
@pytest.mark.parametrize("context, given", [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize("flags", ["--layers 2", "--draw-rewards", "--reward-loss mse --tokens-per-frame 64"])
def test_dream_equals_step_by_step(context, given, flags):
    """With the same random numbers, a dream is the one by the book; padding has no part in it."""
    args = tiny_args(*flags.split())
    agent = bold_agent(args)
    torch.manual_seed(1)
    steps = args.sequence_length - context  # as many as there are positions for
    tokens, actions = random_text(args, 3, context)
    seen = torch.rand(3, 5, 3, 64, 64) * 2 - 1
    padding = (0, 2, 4)  # frames
    valid = torch.arange(5) >= torch.tensor(padding)[:, None]
    played = torch.randint(6, (3, steps)) if given else None
    torch.manual_seed(2)
    fast = iris.imagine(agent, steps, seen, valid, tokens, actions, played)
    states = []
    for b, first in enumerate(padding):
        states.append(agent.actor_critic.initial_state(1))
        if first < 4:
            states[b] = agent.actor_critic(seen[b : b + 1, first:4], states[b])[2]
    state = torch.cat(states)
    close(fast["state"], state, 1e-4, 1e-5)
    torch.manual_seed(2)
    slow = naive_dream(agent, tokens, actions[:, :-1], seen[:, -1], state, steps, played)
    for name in ("tokens", "actions", "ends"):
        assert torch.equal(fast[name], slow[name])
    for name in ("rewards", "frames"):
        close(fast[name], slow[name], 1e-4, 1e-4)
    assert not given or torch.equal(fast["actions"], played)
    assert len(slow["tokens"].unique()) > 10  # it does not always dream the same
    assert len(slow["actions"].unique()) > 2


# ---- Actor-critic --------------------------------------------------------------------------------
def test_lambda_returns_are_means():
    """A lambda-return is the weighted mean of all n-step returns."""
    torch.manual_seed(0)
    rewards, values = torch.randn(6, 11), torch.randn(6, 12)
    ends = (torch.rand(6, 11) < 0.15).float()
    returns = iris.lambda_returns(rewards, values, ends, 0.9, 0.8)

    def n_step(b, t, n):
        total = 0.0
        for k in range(n):
            total += 0.9**k * rewards[b, t + k]
            if ends[b, t + k]:
                return total
        return total + 0.9**n * values[b, t + n]

    for b in range(6):
        for t in range(11):
            rest = 11 - t
            expected = 0.8 ** (rest - 1) * n_step(b, t, rest)
            for n in range(1, rest):
                expected += 0.2 * 0.8 ** (n - 1) * n_step(b, t, n)
            close(returns[b, t], expected, 1e-4, 1e-5)


def naive_policy_loss(policy, dreamt, args):
    """The policy stepped through the dream frame by frame, its losses summed step by step."""
    rewards, ends = dreamt["rewards"], dreamt["ends"]
    state = dreamt["state"]
    values, scores, entropies = [], [], []
    for t in range(5):
        logits, value, state = policy(dreamt["frames"][:, t : t + 1], state)
        values.append(value[:, 0])
        if t < 4:
            distribution = torch.distributions.Categorical(logits=logits[:, 0])
            scores.append(distribution.log_prob(dreamt["actions"][:, t]))
            entropies.append(distribution.entropy())
    values = torch.stack(values, dim=1)
    returns = iris.lambda_returns(rewards, values.detach(), ends, args.gamma, args.td_lambda)
    terms = []
    for b in range(4):
        for t in range(4):
            if not ends[b, :t].any():  # what is dreamt after an end is worth nothing
                advantage = returns[b, t] - values[b, t]
                terms.append(torch.stack([advantage, scores[t][b], entropies[t][b]]))
    advantage, score, entropy = torch.stack(terms, dim=1)
    gain = advantage.detach()
    if args.norm_advantage:
        gain = gain / (gain.square().mean().sqrt() + 0.01)
    return (advantage**2 - score * gain - args.entropy_coef * entropy).mean()


@pytest.mark.parametrize("norm", ["--norm-advantage", "--no-norm-advantage"])
def test_actor_critic_loss(norm):
    """Loss and gradients are a naive version's; nothing is learned from what follows an end."""
    args = tiny_args("--entropy-coef", "0.3", norm)
    policy = bold_agent(args).actor_critic
    parameters = list(policy.parameters())
    ends = torch.zeros(4, 4)
    ends[1, 1] = ends[1, 3] = ends[2, 3] = 1
    dreamt = dict(frames=torch.rand(4, 5, 3, 64, 64) * 2 - 1, ends=ends)
    dreamt["actions"] = torch.randint(6, (4, 4))
    dreamt["rewards"] = torch.randint(-1, 2, (4, 4)).float()
    dreamt["state"] = torch.randn(4, 2, 16)
    loss, _ = policy.loss(dreamt, args)
    naive = naive_policy_loss(policy, dreamt, args)
    close(loss, naive, 1e-5)
    actual = torch.autograd.grad(loss, parameters)
    for gradient, expected in zip(actual, torch.autograd.grad(naive, parameters)):
        assert expected.abs().max() > 1e-3
        close(gradient, expected, 1e-3, 1e-5)


def test_whitened_pixels():
    """What the small preset's policy sees of a frame: distances from the mean, in standard deviations."""
    policy = bold_agent(tiny_args()).actor_critic
    scale = torch.rand(3, 64, 64) * (torch.rand(3, 64, 64) > 0.3)  # some pixels never change
    policy.adapt(torch.randn(100, 3, 64, 64) * scale + 0.3)
    frames = torch.randn(50, 3, 64, 64) * scale + 0.3
    policy.adapt(frames)  # the frames before are forgotten
    pooled = frames.view(50, 3, 16, 4, 16, 4).mean((3, 5))
    distance = (pooled - pooled.mean(0)) / (pooled.var(0) + 0.05**2).sqrt()
    whitened = policy.cnn[:5](frames)
    close(whitened, distance.clamp(-5, 5), 1e-3, 1e-4)
    assert whitened.std() > 0.5
    assert policy.cnn[:5](10 * frames).abs().max() == 5


@pytest.mark.parametrize("kept", [False, True])
def test_dreams_begin_in_the_replay(kept):
    """Training's dreams know the last frames that the policy has seen; each is in one update."""
    args = tiny_args("--actor-critic-updates", "1", "--actor-critic-minibatch", "24")
    agent = bold_agent(args)
    replay = filled_replay()
    steps = torch.arange(len(replay.tokens))
    agent.tokenizer.codebook.weight.data[:] = torch.arange(32)[:, None] / 32  # shades of grey
    replay.tokens[:] = steps[:, None] % 32
    replay.tokens[:, 15] = steps // 32
    if kept:  # as the paper's are
        replay.reconstructions = agent.tokenizer.decode(replay.tokens)
    seen, dreams, parts, loss = [], [], [], agent.actor_critic.loss

    def dreamer(*past):
        seen.append(past)
        dreams.append(iris.imagine(agent, 4, *past))
        return dreams[0]

    def watched(part, args):
        parts.append(part)
        return loss(part, args)

    agent.actor_critic.loss = watched
    optimizer = iris.make_optimizers(agent, args)["actor_critic"]
    iris.train_actor_critic(agent, optimizer, replay, args, dreamer)
    ((frames, valid, tokens, actions),) = seen
    shades = 32 * frames[:, :, 0, [0, 63], [0, 63]] @ torch.tensor([1.0, 32.0])
    index = shades.round().long()  # (64, 5) steps of the replay
    assert valid[:, -1].all()
    assert not valid.all()
    assert torch.equal(tokens[..., 0], index[:, -2:] % 32)
    assert torch.equal(actions, replay.actions[index[:, -2:]])
    assert [len(part["frames"]) for part in parts] == [24, 24, 16]
    for name, x in dreams[0].items():
        assert torch.equal(torch.cat([part[name] for part in parts]), x)


def test_update_clips_the_gradient():
    """A gradient longer than 10 is scaled to that length; the metrics tell how long it was."""
    network = torch.nn.Linear(2, 1, bias=False)
    network.loss = lambda slope: (slope * network.weight.sum() / math.sqrt(2), {})
    for slope, length in ((3.0, 3.0), (40.0, 10.0)):
        before = network.weight.clone()
        optimizer = torch.optim.SGD(network.parameters(), 1.0)
        metrics = iris.update("x", network, optimizer, tiny_args(), slope)
        close((before - network.weight).norm(), length)
        close(metrics["x_gradient"], slope)


# ---- A GPU's time --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tokenizer", "world_model", "actor_critic"])
def test_no_update_waits_for_the_device(name, hub, monkeypatch):
    """On torch's meta device nothing has a value, and updates go through until means are read."""
    args = tiny_args("--no-local-tokens", "--actor-critic-minibatch", "64")
    args.device = "meta"
    args.tokenizer_updates = args.world_model_updates = args.actor_critic_updates = 3
    monkeypatch.setenv("TORCH_HOME", str(hub))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    agent = iris.Agent(args, 6).to("meta")
    replay = iris.Replay(args)
    replay.size, replay.episodes = 200, 3
    updates = []
    optimizer = types.SimpleNamespace(zero_grad=agent.zero_grad, step=lambda: updates.append(name))
    dreamer = partial(iris.imagine, agent, args.horizon - 1)
    helpers = dict(tokenizer=[iris.load_lpips("meta")], world_model=[])
    helpers["actor_critic"] = [iris.accelerate(dreamer, args)]
    with pytest.raises(RuntimeError, match="meta"):
        getattr(iris, f"train_{name}")(agent, optimizer, replay, args, *helpers[name])
    assert len(updates) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph wants a GPU")
@pytest.mark.parametrize("mixed", ["--mixed-precision", "--no-mixed-precision"])
def test_cuda_graph(mixed, monkeypatch):
    """Dreams through the CUDA graph are those without, for new inputs and new weights too."""
    args = tiny_args(mixed)
    args.device = "cuda"
    agent = bold_agent(args).cuda()
    monkeypatch.setattr(iris, "sample", lambda logits: logits.argmax(-1))  # nothing random is left
    plain = partial(iris.imagine, agent, args.horizon - 1)
    graph = iris.accelerate(plain, args)
    for seed in range(3):
        torch.manual_seed(seed)
        real = torch.randint(32, (3, 1, 16), device="cuda"), torch.zeros(3, 1, device="cuda").long()
        seen = torch.rand(3, 5, 3, 64, 64, device="cuda") * 2 - 1
        valid = torch.rand(3, 5, device="cuda") < 0.8
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, args.mixed_precision):
            eager = plain(seen, valid, *real)
        torch.manual_seed(seed)
        replayed = graph(seen, valid, *real)
        drawn = torch.rand(1, device="cuda")  # recording must not have moved the generator on
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(1, device="cuda"), drawn)
        for name in ("frames", "tokens", "actions", "rewards", "ends"):
            assert torch.equal(replayed[name], eager[name]), (seed, name)
        for parameter in agent.parameters():
            parameter.data.mul_(1.01)


# ---- Environment: real games, against the bare emulator ------------------------------------------
ROMS = dict(Pong="pong", MsPacman="ms_pacman", Breakout="breakout")


class RawGame:
    """A game on the emulator itself, raw frame by raw frame, after the no-ops that make_env gives it."""

    def __init__(self, game, seed, training=True):
        env = iris.make_env(f"ALE/{game}-v5", training=training)
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
    env = iris.make_env(f"ALE/{game}-v5", training=False)
    frames, _ = env.reset(seed=5)
    raw = RawGame(game, 5, training=False)
    assert env.single_action_space.n == len(raw.ale.getMinimalActionSet())
    rng = np.random.default_rng(3)
    over = False
    while not over and raw.ale.getFrameNumber() < 2000:
        assert np.array_equal(frames[0, 0], raw.frame)
        action = int(rng.integers(env.single_action_space.n))
        frames, rewards, terminated, truncated, _ = env.step(np.array([action]))
        assert rewards[0] == raw.step(action)
        over = raw.ale.game_over()
        assert (terminated[0], truncated[0]) == (over, False)
    assert over == (game != "Pong")


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


def test_environment_starts():
    """In training the seed decides about up to 30 no-ops; evaluations all begin alike."""

    def raw_frames(training):
        env = iris.make_env("ALE/Pong-v5", training=training)
        return [int(env.reset(seed=seed)[1]["episode_frame_number"][0]) for seed in (*range(40), 7)]

    counts = raw_frames(training=True)
    assert len(set(counts)) > 10
    assert 20 < max(counts) <= 30
    assert counts[7] == counts[-1]
    assert len(set(raw_frames(training=False))) == 1


def test_time_limit():
    """After 20,000 raw frames a new game begins, which is no end; an evaluation goes on."""
    game = iris.Game("ALE/Breakout-v5", 0)  # it waits for ever for its fire button
    env = iris.make_env("ALE/Breakout-v5", training=False)
    env.reset(seed=0)
    for t in range(1, 5001):
        assert game.number == 0
        assert game.step(0) == (0.0, False, None if t < 5000 else 0.0)
        assert game.opens == (t == 5000)
        _, _, terminated, truncated, _ = env.step(np.array([0]))
        assert not terminated[0] and not truncated[0]
    assert game.number == 1


@pytest.mark.parametrize("name", ["Breakout", "MsPacman"])
def test_games_against_the_emulator(name):
    """Two whole games, life after life, are those of the emulator with the seeds 40 and 41."""
    game = iris.Game(f"ALE/{name}-v5", 40)
    raw = RawGame(name, 40)
    rng = np.random.default_rng(0)
    first, score, scores = True, 0, []
    while len(scores) < 2:
        assert torch.equal(game.frame, iris.resize(raw.frame[None, None])[0])
        assert (game.opens, game.number) == (first, len(scores))
        action, lives = int(rng.integers(game.num_actions)), raw.ale.lives()
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


def test_no_op_that_loses_a_life():
    """The no-op after a lost life may lose another: all rewards count, and the game goes on."""
    game = iris.Game("ALE/Breakout-v5", 0)
    script = iter([(1, True), (2, True), (4, False)])  # reward, lost

    def step(actions):
        reward, lost = next(script)
        clock = {"episode_frame_number": [0]}  # it never goes back
        return np.zeros((1, 1, 64, 64, 3), np.uint8), [reward], [lost], [False], clock

    game.env = types.SimpleNamespace(step=step)
    assert game.step(3) == (7.0, True, None)


# ---- Evaluation ----------------------------------------------------------------------------------
class ScriptedGames:
    """Game i pays i + 1 a step for lengths[i] steps, then what nobody may count. Frames say the step."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def reset(self, seed):
        self.seeds = list(seed)
        self.steps = -1
        frames, *_ = self.step(None)
        return frames, {}

    def step(self, actions):
        self.steps += 1
        games = len(self.lengths)
        frames = np.full((games, 1, 64, 64, 3), self.steps, np.uint8)
        rewards = np.where(self.steps <= self.lengths, np.arange(games) + 1, 100)
        over = self.steps == self.lengths
        return frames, rewards, over, np.zeros_like(over), {}


def real_games(args, games):
    """Real games of a tiny agent -> returns, frames, actions, rewards."""
    agent = bold_agent(args)
    returns, recording = iris.play_games(agent, iris.accelerate(agent.act, args), args, games)
    return returns, *recording


def test_evaluation_counts_every_game_once(monkeypatch):
    """Games count to their last step, and not beyond it."""
    env = ScriptedGames([5, 3, 4, 6])
    monkeypatch.setattr(iris, "make_env", lambda *_, **__: env)
    returns, frames, actions, rewards = real_games(tiny_args(), 4)
    assert returns.tolist() == [5, 6, 12, 24]
    seeds = set(env.seeds)
    assert len(seeds) == 4
    assert frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert rewards.sum() == 5
    real_games(tiny_args("--seed", "2"), 4)
    assert not seeds & set(env.seeds)  # other games


def test_health(monkeypatch):
    """Metrics of two segments of two steps and two tokens; the fifth step is left over."""
    tokens = torch.tensor([[0, 1], [0, 2], [1, 1], [1, 1]])
    frames = torch.zeros(5, 64, 64, 3, dtype=torch.uint8)
    for i in range(4):
        frames[i, 8:16, 8 * i : 8 * i + 8] = 255  # a white square moves
    frames[4] = 255
    drawn = iris.to_network(frames[:4]).clamp(max=0)  # half of its contrast is lost
    chances = torch.full((2, 4, 3), 1 / 4)
    chances[:, 1, 0] = 1 / 2  # token 0 of the second frame; right, wrong
    chances[:, 2, 1] = 1 / 2  # token 1; wrong, right
    chances[:, ::3, 2] = 99.0  # about other frames
    rewards = torch.tensor([0.0, 2.0, -5.0, 1.0, 7.0])
    told = 0.7 * torch.eye(3)[[1, 2, 1, 0]] + 0.1  # expected signs 0, 0.6, 0, -0.6
    answers = chances.log(), told.log().view(2, 2, 3), None
    agent = bold_agent(tiny_args())
    monkeypatch.setattr(agent.tokenizer, "encode", lambda x: tokens)
    monkeypatch.setattr(agent.tokenizer, "decode", lambda tokens: drawn)
    monkeypatch.setattr(agent.world_model, "predict", lambda tokens, actions: answers)
    metrics = iris.health(agent, (frames, torch.zeros(5).long(), rewards), 2)
    assert metrics.pop("rewards_paid") == 3
    by_hand = dict(moving_contrast_kept=1 / 2, token_accuracy=1 / 2, copy_accuracy=3 / 4, reward_recall=1 / 3)
    assert metrics == pytest.approx(by_hand, rel=1e-4)


def test_short_and_empty_games(tmp_path, monkeypatch):
    """A game of three steps has pictures and finite metrics, also one in which nothing happens."""
    args = tiny_args()
    agent = bold_agent(args)
    monkeypatch.setattr(iris, "make_env", lambda env, games, training: ScriptedGames([3, 5]))
    result, recording = iris.evaluate(agent, iris.accelerate(agent.act, args), args, 2)
    assert len(recording[0]) == 3 < args.horizon < args.sequence_length
    assert result["returns"] == [3, 10]
    iris.write_pictures(agent, args, recording, tmp_path)
    assert cv2.imread(str(tmp_path / "dream.png")) is not None
    still = [torch.zeros_like(column) for column in recording]
    quiet = iris.health(agent, still, 3)
    assert quiet["rewards_paid"] == 0 and "reward_recall" not in quiet
    assert all(math.isfinite(value) for value in [*result["health"].values(), *quiet.values()])


# ---- Pictures and play ---------------------------------------------------------------------------
@torch.no_grad()
def test_pictures_show_what_the_model_says(tmp_path, monkeypatch):
    """The picture: real, decoded, dreamt with and without the actions played; the film: real, dreamt."""
    args = tiny_args()
    agent = bold_agent(args)
    frames = torch.randint(256, (40, 64, 64, 3), dtype=torch.uint8)
    x = iris.to_network(frames)
    tokens = agent.tokenizer.encode(x)
    actions = torch.randint(6, (40,))
    rewards = torch.zeros(40)
    rewards[20] = -2.0
    dreamt = watch_dreams(monkeypatch)
    images, draw = [], iris.draw
    captions, write = [], cv2.putText

    def drawn(rows):
        images.append(rows)
        return draw(rows)

    def caption(image, text, *how):
        captions.append(text)
        return write(image, text, *how)

    monkeypatch.setattr(iris, "draw", drawn)
    monkeypatch.setattr(cv2, "putText", caption)
    iris.write_pictures(agent, args, (frames, actions, rewards), tmp_path)
    (*_, played, dream), (*_, none, others), (known, past, film, films) = dreamt
    real, decoded, given, *futures = images[0]
    window = slice(17, 23)  # the six steps around the first reward
    assert torch.equal(real, x[window])
    close(decoded, agent.tokenizer.decode(tokens[window]))
    assert torch.equal(given[:3], decoded[:3])  # half of the steps is known
    assert torch.equal(given[2:], dream["frames"][0])
    assert torch.equal(played[0], actions[19:22])
    assert none is None  # here the policy acts
    assert not torch.equal(futures[0], futures[1])
    for future, other in zip(futures, others["frames"]):
        assert torch.equal(future[2:], other)
    picture = cv2.imread(str(tmp_path / "dream.png"))[1::3, 1::3, ::-1]
    for i, row in enumerate(images[0]):
        above = to_pixels(row)[:, :56]  # the captions
        assert np.array_equal(picture[64 * i : 64 * i + 56], np.concatenate(list(above), axis=1))
    _, signs, ends = agent.world_model.predict(tokens[None, window], actions[None, window])
    expected = signs[0].softmax(-1) @ torch.tensor([-1.0, 0.0, 1.0])
    for i in range(6):
        came = "real -2" if i == 3 else "real +0"
        model = f"expected {expected[i]:+.2f}, end {ends[0].softmax(-1)[i, 1]:.2f}"
        dreams = ["known"] * 4 if i < 3 else ["dreamt, as played", *["dreamt, policy acts"] * 3]
        assert captions[6 * i : 6 * i + 6] == [came, model, *dreams]
    for i, dreamt in enumerate(films["frames"]):
        first = 3 * i  # frame that this dream of the film knows
        assert torch.equal(known[i], tokens[first : first + 3])
        assert torch.equal(past[i], actions[first : first + 2])
        assert torch.equal(film[i], actions[first + 2 : first + 5])
        for pair in zip(x[first + 3 :], dreamt[1:]):
            assert torch.equal(images.pop(1), torch.stack(pair)[None])
    _, animation = cv2.imreadanimation(str(tmp_path / "dream.gif"))
    assert (len(images), len(animation.frames)) == (1, 36)


def test_play(monkeypatch):
    """Keys are actions on the last frames, r begins anew, after an end only r helps, q leaves."""
    args = tiny_args()
    agent = bold_agent(args)
    script = list("r dax d! arqw")
    taken = [1, 2, 3, 0, 1, 2, 0]  # x means nothing in Pong; at ! the dream ends
    keys, pressed, titles = iter(script), [], []

    def press(milliseconds):
        pressed.append(next(keys))
        return ord(pressed[-1])

    def fate(dreamt):
        dreamt["ends"][:] = pressed[-1] == "!"

    monkeypatch.setattr(cv2, "imshow", lambda name, image: None)
    monkeypatch.setattr(cv2, "setWindowTitle", lambda name, title: titles.append(title))
    monkeypatch.setattr(cv2, "waitKey", press)
    dreamt = watch_dreams(monkeypatch, fate)
    iris.play(agent, args, [torch.randint(256, (9, 64, 64, 3), dtype=torch.uint8)])
    assert pressed == script[:-1]  # nothing is asked after q
    assert [int(given) for _, _, given, _ in dreamt] == taken
    shown, score = dreamt[0][0], 0.0  # all tokens since r
    for i, (tokens, past, _, result) in enumerate(dreamt):
        length = min(i + 1, args.sequence_length - 1)  # a place is left for the next frame
        assert torch.equal(tokens, shown[:, -length:])
        assert past[0].tolist() == taken[i - length + 1 : i]
        shown = torch.cat([shown, result["tokens"][:, 1:]], dim=1)
        score += float(result["rewards"])
        assert titles[i + 2].startswith(f"rewards {score:+.1f}")
    assert all("press r" in title for title in titles[8:11])  # after it keys do nothing
    assert titles[11] == "rewards +0.0"


# ---- The command line, on real Pong --------------------------------------------------------------
# Four epochs: the world model joins in the second, the policy in the third.
SCHEDULE = """--epochs 4 --collect-epochs 3 --collect-steps 40 --tokenizer-start 1 --world-model-start 2
    --actor-critic-start 3 --tokenizer-updates 3 --world-model-updates 3 --actor-critic-updates 3 --tokenizer-batch 4
    --world-model-batch 4 --actor-critic-batch 4 --eval-every 4 --eval-games 1 --final-games 2""".split()


def command(*flags):
    """The program with these flags, as a list for subprocess."""
    return [sys.executable, iris.__file__, *(str(flag) for flag in flags)]


def finish(*flags):
    """Runs the program to its end."""
    return subprocess.run(command(*flags), capture_output=True, text=True)


def only_line(errors):
    """The one line that the program itself says on stderr: the emulator greets there."""
    greetings = ("A.L.E", "[Powered by", "Downloading", "usage:")
    (line,) = [line for line in errors.splitlines() if not line.startswith(greetings)]
    assert line.startswith("iris.py: ")
    return line


def epochs_of(folder):
    """Whole epochs that a run has behind it."""
    path = folder / "metrics.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


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


def test_whole_training(whole_run):
    """A run collects real Pong, trains all three networks, evaluates, and leaves its files."""
    run = read_run(whole_run)
    config = json.loads((whole_run / "config.json").read_text())
    rows = run["rows"]
    assert [row["real_steps"] for row in rows] == ["40", "80", "120", "120"]
    for name, first in (("token_loss", 2), ("policy_loss", 3), ("eval_return", 4)):
        assert [row[name] != "" for row in rows] == [epoch >= first for epoch in (1, 2, 3, 4)]
    torch.manual_seed(config["seed"])
    fresh = iris.Agent(types.SimpleNamespace(**config), 6)
    for name, weight in fresh.named_parameters():
        assert weight.detach().numpy().tobytes() != run["state"]["agent"][name], name
    weights = iris.read_checkpoint(whole_run)["agent"]
    codes = weights["tokenizer.codebook.weight"]
    shown = torch.stack([codes - codes.mean(0), weights["world_model.code_pixels"]])
    assert shown.flatten(1).corrcoef()[0, 1] > 0.999  # the world model knows the last codes
    assert len(run["result"]["returns"]) == 2
    for when in ("epoch_004", "final"):
        folder = whole_run / "media" / when
        assert cv2.imread(str(folder / "dream.png")).std() > 5
        assert (folder / "dream.gif").exists()
    args = iris.parse_args(["--resume", str(whole_run)])
    game, again = (iris.Game("ALE/Pong-v5", config["seed"] * 100_000) for _ in range(2))
    replay = iris.Replay(args)
    history = iris.load_run(whole_run, iris.Agent(args, 6), {}, again, replay)
    assert len(history) == 4
    actions = iris.read_checkpoint(whole_run)["actions"].tolist()
    for i, action in enumerate(actions):
        assert torch.equal(replay.frames[i], game.frame)
        assert replay.actions[i] == action
        assert game.step(action)[:2] == (replay.rewards[i], replay.ends[i])
    assert (replay.size, replay.episodes) == (120, 1)
    assert torch.equal(again.frame, game.frame)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_stopped_and_resumed(how, whole_run, tmp_path):
    """Stopped at a random moment and resumed, a run ends as the undisturbed one, to the last bit."""

    def listen():  # a shell's background jobs, and so their tests, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    run_dir = tmp_path / "my runs"
    start = command(*TINY, *SCHEDULE, "--run-dir", run_dir)
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        while not any(epochs_of(folder) for folder in run_dir.glob("*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(getattr(signal, how))
        errors = process.stderr.read()
    folder = next(run_dir.iterdir())
    assert process.returncode != 0
    assert not (folder / "eval.json").exists()
    if how == "SIGINT":
        assert process.returncode == 130
        assert f"--resume '{folder}'" in only_line(errors)  # ready to be pasted
    assert finish("--resume", folder).returncode == 0
    assert read_run(folder) == read_run(whole_run)


def test_finished_run_goes_on(whole_run, a_run, monkeypatch):
    """A finished run repeats its last evaluation if resumed; more epochs train on, and collect."""
    (a_run / "eval.json").unlink()
    (a_run / "config.json").unlink()  # it is for people
    assert iris.main(["--resume", str(a_run / "checkpoint.pt")]) == 0
    before = read_run(whole_run)
    assert read_run(a_run) == before
    state = iris.read_checkpoint(a_run)
    state["args"]["device"] = "cuda"  # as if from a machine with a GPU: it goes on without one
    torch.save(state, a_run / "checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert iris.main(["--resume", str(a_run), "--epochs", "5", "--collect-epochs", "5"]) == 0
    assert (a_run / "config.json").exists()
    after = read_run(a_run)
    assert after["rows"][:4] == before["rows"]
    assert after["rows"][4]["real_steps"] == "160"
    assert after["state"]["agent"] != before["state"]["agent"]
    state["rewards"][0] += 1  # as if of another emulator: then the frames are others, too
    torch.save(state, a_run / "checkpoint.pt")
    assert iris.main(["--resume", str(a_run), "--epochs", "5"]) == 2


def test_eval_and_dream(a_run, capfd):
    """--eval repeats training's last evaluation in a file of its own, --dream draws; all else stays."""
    before = contents(a_run)
    trained = json.loads((a_run / "eval.json").read_text())
    for flags, other in (([], {}), (["--final-games", "1"], dict(final_games=1))):
        assert iris.main(["--eval", str(a_run), *flags]) == 0
        (path,) = a_run.glob("eval-*.json")
        result = json.loads(path.read_text())
        line = iris.summary(result)
        assert capfd.readouterr().out.strip().endswith(line)
        assert ("+-" in line) == (other == {})  # one game has no interval
        assert line.endswith(f"normalised {(result['mean'] + 20.7) / 35.3:.3f}")
        assert result.pop("changed_flags") == other
        assert (result == trained) == (other == {})
        path.unlink()
    assert len(result["returns"]) == 1
    assert iris.main(["--dream", str(a_run)]) == 0
    made = a_run / "media" / "dream"
    assert cv2.imread(str(made / "dream.png")).shape[1] == 6 * 192  # T frames
    assert contents(a_run).keys() - before == {made / "dream.gif", made / "dream.png"}
    assert before.items() <= contents(a_run).items()


def test_loss_that_is_not_finite(tmp_path, capfd, monkeypatch):
    """A loss beyond all numbers stops the run with code 1 and a line; the last good epoch stays."""
    loss = iris.WorldModel.loss

    def diverged(*batch):
        value, metrics = loss(*batch)
        return value * math.nan, metrics | dict(token_loss=value * math.nan)

    monkeypatch.setattr(iris.WorldModel, "loss", diverged)
    assert iris.main([*TINY, *SCHEDULE, "--run-dir", str(tmp_path)]) == 1
    line = only_line(capfd.readouterr().err)
    assert "token_loss in epoch 2 is nan" in line and "--resume" not in line
    (folder,) = tmp_path.iterdir()
    assert epochs_of(folder) == 1


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_full_disk(after, whole_run, a_run, capfd, monkeypatch):
    """A disk that is full at any of the writings: one line, code 2, and the run can go on."""
    before = (a_run / "checkpoint.pt").read_bytes()
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert iris.main(["--resume", str(a_run), "--epochs", "5"]) == 2
    assert re.search("No space left.*--resume", only_line(capfd.readouterr().err))
    assert after > 0 or (a_run / "checkpoint.pt").read_bytes() == before
    assert iris.main(["--resume", str(a_run), "--epochs", "4"]) == 0
    assert read_run(a_run) == read_run(whole_run)


# ---- Refusals ------------------------------------------------------------------------------------
REFUSED = {  # flags -> what the one line names; RUN is a whole run
    "--env Brekout": "Breakout",
    "--env CartPole-v1": "make_env",
    "--env Mine/Carla-v0": "Mine",
    "--seed 1764057600123456789": "--seed",
    "--collect-steps -5": "--collect-steps",
    "--gamma nan": "--gamma",
    "--ema-decay 1.5": "--ema-decay",
    "--horizon 7": "--horizon",
    "--width 33": "--width",
    "--tokenizer-start 3": "start",
    "--epoch 3": "--epoch",
    "--perceptual-loss": "LPIPS teaches",
    "--perceptual-loss --no-local-tokens": "no weights for LPIPS",
    "--resume RUN/metrics.csv": "is a file",
    "--tensorboard": "tensorboard",
    "--play RUN": "display",
    f"--run-dir {__file__}/runs": "test_iris.py",
    "--resume nowhere": "nowhere",
    "--dream RUN --env Breakout": "does not fit",
    "--eval a --dream b": "--dream",
    "--resume RUN --layers 3": "--layers",
    "--resume RUN --collect-epochs 1": "--collect-epochs",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(flags, whole_run, tmp_path, capfd, monkeypatch):
    """Flags that cannot work: code 2, one line that names them, and no folder is left."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(iris, "VGG_URL", "http://127.0.0.1:9/vgg16-397923af.pth")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delenv("DISPLAY", raising=False)
    before = contents(whole_run)
    setting = [] if "RUN" in flags else [*TINY, *SCHEDULE, "--run-dir", str(tmp_path / "runs")]
    try:
        code = iris.main([*setting, *flags.replace("RUN", str(whole_run)).split()])
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert code == 2
    assert REFUSED[flags] in only_line(capfd.readouterr().err)
    assert contents(whole_run) == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error", [RuntimeError("STATUS_ALLOC_FAILED"), MemoryError(), NotImplementedError("mat1")])
def test_want_of_memory(error, tmp_path, capfd, monkeypatch):
    """Too little memory is a line and code 2; a mistake in the program keeps its traceback."""

    def fail(args):
        raise error

    monkeypatch.setattr(iris, "Replay", fail)
    wrong = "mat1" in str(error)
    with pytest.raises(RuntimeError, match="mat1") if wrong else contextlib.nullcontext():
        assert iris.main([*TINY, "--run-dir", str(tmp_path)]) == 2
        assert "--resume" not in only_line(capfd.readouterr().err)  # there is nothing to resume


def damage(path, change):
    """Replaces a file by change(its bytes)."""
    path.write_bytes(change(path.read_bytes()))


DAMAGED = {
    "no checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "zeroed": lambda run: damage(run / "checkpoint.pt", lambda x: x[:90_000] + bytes(9) + x[90_009:]),
    "a number": lambda run: torch.save(7, run / "checkpoint.pt"),
    "foreign": lambda run: torch.save({"0.weight": torch.zeros(3)}, run / "checkpoint.pt"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_runs(case, a_run, capfd):
    """A damaged or foreign checkpoint is refused in a line, and no file is touched."""
    DAMAGED[case](a_run)
    before = contents(a_run)
    for mode in ("--resume", "--eval", "--dream"):
        assert iris.main([mode, str(a_run)]) == 2
        line = only_line(capfd.readouterr().err)
        assert str(a_run) in line or "--env" in line  # no game is known of a foreign one
        assert contents(a_run) == before


# ---- README --------------------------------------------------------------------------------------
def test_readme():
    """Every flag, function, class and file that README.md names exists; --help lists the flags."""
    readme, source = Path(iris.__file__).with_name("README.md"), Path(iris.__file__).read_text()
    spans = re.findall(r"```.*?```|`[^`]+`", readme.read_text(), re.DOTALL)

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
    for name in words(r"(?<![\w/.-])[a-z_]+\.(?:py|txt|json|csv|bin|png|gif|mp4)\b"):
        assert readme.with_name(name).exists() or name in source, name


# ---- Parity with the authors' implementation -----------------------------------------------------
# Their networks were filled by a rule instead of trained, and their outputs written down: whoever gets the same numbers
# computes the same functions. "shapes" are those of a checkpoint for 6 actions. Packed: json, lzma, base 85.
PACKED = """
0ssI30RR90|NsC0{{TIR&^ZR2Z~6U3Gv>{r(}Hh%=g>ZsRFiy6a!U44OnjG14hl227yYl9J#A~nLg5+Bq)$sHo`={oJK+53bS)oTFKrHcb&nU#*~xxYHR(ZWGm1ibw%Q*VTKc&5d+r?e
R)r(H)r2^EGZuhTMT}f6d9qU?nH^1U9UAwT$lGK4n0#G!Ys*Ynx64#Vv-`^NV8`SegJUw09jI)sky9s6&$Shj90NQ}id?7E$E*`lizXnG+mv9wL}#hs4!I^fVb<mMGRSFgnavic9&G_U
xYx8i(z4$R$a(<r<L^<c_+;xZ)Aprd9-J^8t%rmVvOgZB4BJ9n_ZAs%$wxELsq8|b*y#?|LQL9a#OK*w+mQ)F&{i2xGG3ftl3I>*;=_KMVQE<Hm!su@yZUi<IcsLwZdiEA91MUNOE{6t
M#))bKWsPU@)KqUyI|$QgYu+Wv?=f3=>}vk$3wg~DsGJr)Ex55r(;<hi|)|sv5+f3hPDLZ>~)q`Iw19P?w5mefw-n@bJwv!+9al|0mSm9EFU9$<7KXPPI+*n(UcrA#1H<e{X?A`x$DEB
PZ#k=Sh{x3+oRuBi|F!zA$G5*Y2C-0R9fX6lK|s#CEh+IrN8kdph6ww$VxQBD~kv&k`<*c4Z=Gr38E;7MuFy7b?Z%#43|drgLAKgkS5gzdP2x?hrn$%vCLvfa6BXoPWiaB_h**_M1Rpp
gBZMYzhNs1eMqe}&YEm6r*>BCbpT0ig)}`FD8>_g!o$6=49jdLz<`1tf=Ua(&wK_*!-0m}qTVS{Vj^4VoSh2PNQigeLGBkfTg3YtyF~*F9rP7dNh7kKtxjk}Vc|M&K&hhHzzr&-cpe2D
)DQox=b!qL?gz^U7M{cob@%X(t}SXO(0vXcwa#aM)43tY;e0%+l=pHm)&iTqZ{|2C3>_Y9c5J<4vHa5UmMVniW6he6+PeX#7wM}Ci(0J)FGa)IT#%<0xn5Dj-R`gt{81Tilc9$blJjyh
*O|Arf%YTxz(eg`;Ei5JMN)p`f3HcI?+yXK$3Vod9e-+p=mafXRk(WB*YmHn?6xm(%_zyp;6hVlQzwS5GbR{KsSU#nLaf>J@D+-&wUu$@o-AqdrdhtNcemDXX{7<cc;eqvWOdm^DQR?(
r`12|Qx{$hpn1hZ7z%?LnY^Nt>bu()1750Vbt!Aa5&1}@7iRh|p<ADzhC?Km34-MeISFchW#K}cbzinkW4wFS`=Z+OzF~0rTq;s2F4*A%9tcf=V+WzxF!W^^szYyf0p-XS^59;`Crnl8
f+ipfBhBNNZYYE@P#IUj-*78*DzK~H(J0S&AviVmwSerolcH>oBGWXX>dD_W-VB!osD-J2o!sf^FLe<XLV@BW`YGR$g?TkXXAOg&aTasFq{)xq<IbgE&h-M;jGtLAHwXGLc#aAp+v-!7
d$ncr#5lSlb)|-(4&usUsbWAO^R-H1UEPV+481_<m#0x6@(n1%@IcmLd;59!hD}N_1KcSVw<+V<{SXzqj@hQ%eu2*z4tji?3I#-ob#0Jx8}tci@t)jzj5149y(I4(_BHAnXICiw-;C)R
8(Qk&8ikG4%2=SSc3nWtBPFc^VFy;UAi|}10IC0pRm2)yzmd4P#&*vIZ(3<yxFqopmKnED|8hNJ!+GI_gN#c&6Aq(U^kn?)GaH=z&r{;z){NPqqW<E+!`})D)BlS^Zt?jB7%rV5a>Ws7
|5zd=Up*{bd?`~)Q>-mBO1lMg;|Rp`{VNqWHBV<aa%dTk5S^u^@d@^DE;TK&gcD1e-QHiMat9EPZgVaYRUkgi98sghcuXCCz?714OrB->E53EZV>ufWG@SR%_j;Cfa;Y##pH;xS;WyDo
js-e{&@yej_(>#HqA!+(`|I<C0h^DNIyQsK({heE1dx368{;-mc-n{=e|t`sRnBw%nFGkncs_6Vb-YRd8f<%MgaKIh(+N||H1T*UfoI10u%ekGe%4}rX@4kzzhfm9*hv6C+YKm#!V^s#
U!96(XnI33MvXY2;#Bw}MS9cLj9{*ZuK%4tMS|qsr%SQw>{zm<$)5lm%vgnJq2`rX)&SG5m+%h!U@B%>yFq3E(OO3{{gPR<vY}c>uMyP_-<748&AjrH(RQrhI@B?RziKUT#neDIsFt?m
e!H*ZU#AqD3|n5^1tnyp$rfMdI@L>}K8&p_ltFw8A1_jMH8fBua|71)&f^zg!$d;czshcZ$EWxcZOhSV#cl5k%w`$<6D>8^ikb>)XV_sgl2IS<W0Lwh9Wux*FnJDzC+mKr0(-b<AYc#-
%)2Y@nTE|0wYpYEa$3V>IM}v6x33E{q${~3<pRu^*IneXan=cj@`Kk!03Db?-jABip!?3=rH{iMp>L$$!M`dbN%@V3?36;~;#!Q^V`a}fidH<Z3Uo)NZv-|-m`%F7!>993)`AMGbmP<t
uuTfHVK@`6KaKTT^Juo}1*i<}4u@%5!p{R-G?&^?Y<Xbv#1eA)th(n33z!9Ny<0-d1!^zJpIT=#<qQ=RUzzvM9NRHE-BY#MY1hZZO>iEDn!_I?TWQgog5A{|hYCkGT~?!?W1Q*n3&YkH
hlEN5OC)|!c{_mcd*nG>`{*>8;DrCWrXNUz2tk|2ZY{u$)Ns)_QIOACwg@SlZmEiV-+r(Y$f9yB1~5i}C_+q{aTo81fod-~!n$U%pfzsZ1y!=R?BqCq&x&w06KlSxR-{Cy+8po}>O4=5
Y)D=}9?BaV$wddfvkT}PqZ3zJT$r*3<8uDef&)(!E-5JrI<#JYFMK@;uj^ut{dKdk=)<{f$+X5g(QZ3|(#LVSO}+b+BP`h_%^pJG!nry*W;!m#MS6D&i?pEATe~dFx6ir>z=ZES9yv^|
-7^b?H|D@s-eRVz%9jRq`;2fOrx4s`jK?%(|F^vTvYF<xvIZt&mvPBvsxRa1T+op!k<|+qzc*ZYRsfqlYMY6w8JXqlo4BZ|C0xYyKN?2_0{x#TIZ@&=M$(-}QTxoZ_Fq4v=4fIVv;G$v
_GCN>@XWCB5ld>{J!Lt-xVWJFx1ZgWLaBMGO0dBqUVoIMhk|UT!s-%}TDLH0nralb;4dTvifNxSb|y?a&Eje<^-?q$THG>NIi4}^r#R}1ztUEg$rg2kVC5(^z;mSB@hmN_s33HAf2kZk
d}wku%yDqv|8m;QW`}9M7%hN33*Cl+WZ})K=EyV?LSpzVSHG_by1UX*i((oT^L$q(W|af4w&I3jG)K3Q@*!oO`xZ!QAG=oZ_!iy}MgBPZ%NM+O$>kG{KzcdPPql5c<%K|nc%TD7o6>BM
x3O7|EnA^*=PS?h+|ftwxn?@c8o!tWUZlAxR}e7IX$3lL#xvb!D!vLFv#3>mtfGJS>Z@%=-RoZ+9sxtf9Uqs|RrJ=R8-$#N1B>qkKIc72xvU8>vq(}k*G5(@PG%OI$BvC9rV5F=k^;Vx
V5ahM0}0{CaX_^~mYU(xUv+Bp7Z<e1`9`KynASs&KIP=a#_dns144IdKtUAblETdl#a@YbQ&yHkgTlnRm3kgt5RYt%8XUVt2=!);Z3UIdC%gEzf-RgWupq}d``q<M6sF{}eD*~`O%<Y1
787z)alCre*$>1eh08386k@5uNw#rW#5c3w*!ZpdA{`c({IDS$(=D!#KKmG^I<Z=Pf)!P;^T%rfJqT2P<caM`h`p&Eg2K~Ap(sc-57~FkDpMdFzwfYRW<N5<W>UU|jwh#sJQDR>LzTYR
M90G3o;)lrPp0vF?O*qI@es#INsktNh^NiM0pX4vJx&W>pNw>E=-A#LM*jNUCXI<-)P^$?V;!C<`TXCh&9yQBd;NAI69RGw=r9V5n)3p19Cik-p2P@}4;(Bj(d)^Ubx2A7#LuHPJtv8q
=Hf{7h1t2PL^ntD<>E^=stO590gs~bb@|lc1heJa&0aUZKtL%={vfXQC}yad*1^EN!lq0B(*={`UD#Tmwso4kg2O^R>3EN-g?<N24}2p|0rs@@vlUI_f5+VT(!$sKY3o=l+yh{ZtlDU^
?+8Wz!?4v4CeQlvskQa~{xH>=L(%&L+?w>aA%vtkoRnrsqXw8b!X6{oRD0sa96Hus&sn(i00{^0x@`d}p9p=XqXE*vz1eE!9R&UX0j<6R3&DO!v5iSRz9D5+F`0ViyHC6UU%o6~4fFV(
<$i#LL{qDvEdeU#Q2aGwM(_plJ~{b!a=Za>8~l5(!{n9T+K#R+#?@Fk%;^^k0u39MT2qLMlP_>OLcsO>7T&r94~(i%J@;=KT<V-EF5|W(M^;T2oi~_}A1TQBa=32tr%cF=loHg-z@(9l
=)UtxEs5w2bEW~1dGtFN){s*pdhfTQ=Wczuh)zWObmx^SGZxk<^YBP;V@rXgOJt{B$MCv4Ups&{=*sDKsXOs=aEaDdmZ<r_3cw`>{pXNZi@@xTE7)l)lZYqj<Xz3wKe=Mci~N050ECyO
VfS6)$SitYdti1%i8Vm*f_oMcLJPe%oB|pfRWkyuCXDq_7zLiUe)>-y+GV)xwwXX(D(o1yUNFj<A3K&5iLh|Ge8G$vAT<TY=e0FGUaF8R!AGtY3*EaynvhGJ6;$mmcWp3u;`=d1Q$e0b
;KEU{w>i@T7!Y@C07vX2T+13+Jb{0FQ4s`n%PSg8M${G&Ow(4Yhlx}?k_b<aa%8D4qO`L_w~qJhCLq}PgS%SsD|g+$@{G$*E7_{U%l~iF$Cyrp78p}I8HDK5u`hU|O^D;&Mb_lONM|QJ
8MBARl|fUsM=-y#2g6T^G%cNFKx}Za5z-{wZv7oEuH)83ObH8?*Ae2LdOGcxgyD`52R0q4zQplsVzZmhXpSp51l|O+`<J7os;sX4Ly~Md)yI{VU#gyxF+w&iKJTyH?hF`qU#95XX+}rN
^Gov6lG}S9ZM7RW$G<$#PrY<YczkpV{F8W>WXV=2kFOLrZwA5nW>G?7UJ?rQpm3BD^FZ~F?EmLc^aJ&)6Cc2(MBCJ8{dQhM)oWKgN@oZ9CnS5LX##`*8pDI&Iblhd`z~uskryu4Sc_W<
pLJ-9ySwRu;B$4a(Z7l~=#am}VxE+DT3;8}xz=sWv6i(mx{`GnQj}Mh+<{|b+TJU%N3Vou+s|4ZG{Wa_ec`WR=uzUJ`{1>&<wJE{-@0LzdvovW+;r8{cm(fbdu61jgW>ke*#TBQwdsfW
Hi0gs*0ur&6o{Li8n&vM7`u5Hnmv<JL!&!R?Wwx-7FT$JmT6LUr3Sj{%>eP^k7=a`pc1-S2W~`b$RkKV9qongyj}5i3c>{fbMg(v^3`&SFcAA^8|`D*|7;zIhTE8qMe>T{g{zqL=0&Q8
#PJx9|4BT)00
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


@pytest.fixture(scope="module")
def golden():
    """What the authors' code computes, of what, and with which weights."""
    golden = json.loads(lzma.decompress(base64.b85decode("".join(PACKED.split()))))
    blocks = torch.tensor(golden["observations"]["blocks"], dtype=torch.uint8)
    frames = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)
    golden["x"] = iris.to_network(frames)  # two images of coloured blocks
    text = torch.tensor(golden["world_model"]["tokens_flat"]).view(2, 20, 17)
    golden["text"] = text[..., :16], text[..., 16]  # tokens and actions of 20 steps
    weights = {name: fill(name, shape) for name, shape in golden["shapes"].items()}
    assert len(weights) == 609
    # Some of the buffers that theirs hold and that carry nothing.
    weights["world_model.transformer.blocks.0.attn.mask"] = torch.ones(3)
    weights["world_model.head_rewards.indices"] = torch.ones(3)
    weights["tokenizer.lpips.scaling_layer.shift"] = torch.ones(3)
    golden["weights"] = weights
    return golden


@pytest.fixture(scope="module")
def paper(golden):
    """The paper's agent, with as many parameters as theirs, and those weights."""
    args = iris.parse_args("--preset paper --device cpu --no-mixed-precision".split())
    agent = iris.Agent(args, 6).eval()
    counts = [sum(p.numel() for p in network.parameters()) for network in agent.children()]
    assert counts == [4_027_523, 8_448_005, 8_448_005, 3_218_983]
    iris.load_weights(agent, golden["weights"], "Pong.pt")
    return agent


@pytest.fixture(scope="module")
def hub(golden, tmp_path_factory):
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
    return home


@torch.no_grad()
def test_parity_tokenizer(paper, golden, hub, monkeypatch):
    """Latents, tokens, reconstructions and losses are theirs, with LPIPS from torch hub's cache."""
    expected = golden["tokenizer"]
    monkeypatch.setenv("TORCH_HOME", str(hub))
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
@pytest.mark.parametrize("mixed", [False, True])
def test_parity_world_model(mixed, paper, golden):
    """Logits and losses, with padding, are the authors'; in bfloat16 nearly so."""
    expected = golden["world_model"]
    losses = expected["loss"]
    targets = [torch.tensor(losses[name]) for name in ("rewards", "ends", "mask_padding")]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        token_logits, reward_logits, end_logits = paper.world_model.predict(*golden["text"])
        loss, metrics = paper.world_model.loss(*golden["text"], *targets[:2], targets[2].bool())
    near = partial(close, rtol=0.02, atol=0.03) if mixed else close
    near(token_logits[:, -1, :8], expected["observation_logits_last"])
    near(token_logits.std(), expected["observation_logits_std"])
    near(reward_logits[0, [0, 9, 19]], expected["reward_logits"])
    near(end_logits[1, [0, 9, 19]], expected["end_logits"])
    near(metrics["token_loss"], losses["observations"])
    near(metrics["reward_loss"], losses["rewards_ce"])
    near(metrics["end_loss"], losses["ends_ce"])
    near(loss, losses["observations"] + losses["rewards_ce"] + losses["ends_ce"])


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
def test_parity_actor_critic(mixed, paper, golden):
    """Five steps, images moving by 8 pixels, are theirs; in bfloat16 nearly so, but the memory."""
    state = paper.actor_critic.initial_state(2)
    steps = golden["actor_critic"]["steps"]
    assert len(steps) == 5
    near = partial(close, rtol=0, atol=0.01) if mixed else close
    for t, expected in enumerate(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            seen = golden["x"].roll(8 * t, dims=-1)[:, None]
            logits, values, state = paper.actor_critic(seen, state)
        assert {y.dtype for y in (logits, values, state)} == {torch.float32}
        near(logits[:, 0], expected["action_logits"])
        near(values[:, 0], expected["values"])


def test_parity_lambda_returns(golden):
    """The authors' returns, with an end in one row."""
    expected = golden["lambda_returns"]
    names = "rewards values ends returns".split()
    rewards, values, ends, wanted = (torch.tensor(expected[name]) for name in names)
    returns = iris.lambda_returns(rewards[:, :-1], values, ends[:, :-1], expected["gamma"], expected["lambda_"])
    close(returns, wanted[:, :-1])  # their last one is the last value


def test_parity_checkpoint_plays(golden, tmp_path, monkeypatch, capfd):
    """Qbert.pt plays Qbert, by its file's name; a file of another name asks for --env, or fails."""
    torch.save(golden["weights"], tmp_path / "Qbert.pt")
    monkeypatch.setattr(iris, "play_games", partial(iris.play_games, max_steps=25))
    flags = ["--device", "cpu", "--no-mixed-precision", "--final-games", "1"]
    assert iris.main(["--eval", str(tmp_path / "Qbert.pt"), *flags]) == 0
    assert capfd.readouterr().out.strip().splitlines()[-1].startswith("Qbert: ")
    (path,) = (tmp_path / "Qbert.results").glob("eval-*.json")
    assert json.loads(path.read_text())["game"] == "Qbert"
    (tmp_path / "Qbert.pt").rename(tmp_path / "last.pt")
    for more in ([], ["--env", "Klax"]):  # which has 18 actions
        assert iris.main(["--eval", str(tmp_path / "last.pt"), *more, *flags]) == 2
        assert "--env" in only_line(capfd.readouterr().err)


# ---- Scripts: what is measured and not asserted --------------------------------------------------
FIELD = torch.tensor([144.0, 72.0, 17.0])  # the brown of Pong's


def find_ball(frames):
    """Frames of Pong (n, 64, 64, 3) -> pixels that show the ball (n, 64, 64), its place (n, 2)."""
    red, _, blue = (frames.float() - FIELD).unbind(-1)
    # The ball is white. Paddles are orange or green, which have less blue, also when blended.
    shown = (blue > 30) & (red > 0) & (blue > 1.7 * red)
    shown[:, :12] = False  # the score
    shown[:, 57:] = False  # the wall
    weight = shown * blue
    line = torch.arange(64.0)
    row, column = weight.sum(2) @ line, weight.sum(1) @ line
    return shown, torch.stack([row, column], dim=1) / weight.sum((1, 2))[:, None]  # nan: none


@torch.no_grad()
def ball(run):
    """--ball RUN: how much of the ball is drawn, and where it is in dreams of five steps."""
    args = iris.parse_args(["--eval", run, "--device", "cpu"])
    agent = iris.Agent(args, 6).eval()
    iris.load_weights(agent, iris.read_checkpoint(Path(args.run)), run)
    raw = RawGame("Pong", 0)
    rng = np.random.default_rng(0)
    frames, actions = [], []
    while not raw.ale.game_over():
        frames.append(iris.resize(raw.frame[None, None])[0])
        actions.append(int(rng.integers(6)))
        raw.step(actions[-1])
    frames = torch.stack(frames)
    tokens = agent.tokenizer.encode(iris.to_network(frames))
    drawn = to_pixels(agent.tokenizer.decode(tokens))
    shown, place = find_ball(frames)
    known = ~place.isnan().any(1)
    lost = (frames[shown].float() - drawn[shown].float()).abs().sum()
    contrast = (frames[shown].float() - FIELD).abs().sum()
    print(f"{1 - lost / contrast:.1%} of the ball's contrast is drawn ({shown.sum()} pixels)")
    window = torch.arange(len(frames) - 9)[:, None] + torch.arange(10)  # five real, five dreamt
    window = window[known[window[:, [3, 4, 9]]].all(1)]
    past = tokens[window[:, :5]]
    played = torch.tensor(actions)[window]
    seen = agent.tokenizer.decode(past.flatten(0, 1)).unflatten(0, past.shape[:2])
    torch.manual_seed(0)
    dreamt = iris.imagine(agent, 5, seen, torch.ones_like(past[..., 0]), past, played[:, :5], played[:, 4:9])
    _, guess = find_ball(to_pixels(dreamt["frames"][:, 5]))
    before, now, later = place[window[:, [3, 4, 9]]].unbind(1)
    print(f"the ball five steps after {len(past)} frames, mean error in pixels, in rows and in columns:")
    print("  dreamt", (guess - later).abs().nanmean(0), f"gone in {guess.isnan().any(1).float().mean():.1%}")
    print("  flying straight on", (6 * now - 5 * before - later).abs().mean(0))


def baselines(name):
    """--baselines GAME: whole games of random play and of each constant action."""
    args = iris.parse_args(["--env", name, "--device", "cpu"])
    memory = types.SimpleNamespace(initial_state=lambda games: None)
    meanings = gymnasium.make(args.env).unwrapped.get_action_meanings()
    for constant, label in enumerate(["random", *meanings], start=-1):
        games = 30 if constant < 0 else 3  # the emulator has no luck: these three are the same

        def act(frames, state, temperature, constant=constant):
            actions = torch.randint(len(meanings), (len(frames),))
            return actions if constant < 0 else torch.full_like(actions, constant), state

        scores, *_ = iris.play_games(types.SimpleNamespace(actor_critic=memory), act, args, games)
        interval = 1.96 * scores.std(ddof=1) / math.sqrt(games)
        print(f"{name}, {label:13} {scores.mean():9.1f} +- {interval:.1f} (95 %)", flush=True)


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
        print(f"killed after {epochs_of(start[1])} whole epochs", flush=True)
    assert finish(*start).returncode == 0
    assert read_run(next(killed.iterdir())) == read_run(next(whole.iterdir()))
    print(f"{count} kills: the run equals the one never stopped, to the last bit")


def plain_updates(agent, optimizers, replay, args):
    """Updates as one writes them first: float32, all encoded again, dreams without a cache."""
    networks = dict(agent.named_children(), world_model=agent.learner)

    def update(name, loss):
        optimizers[name].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks[name].parameters(), 10.0)
        optimizers[name].step()

    @torch.no_grad()
    def encode(index):
        frames = iris.to_network(replay.frames[index.flatten()])
        return agent.tokenizer.encode(frames).unflatten(0, index.shape)

    def tokenizer():
        index, _ = replay.sample(args.tokenizer_batch, 1)
        update("tokenizer", agent.tokenizer.loss(iris.to_network(replay.frames[index[:, 0]]))[0])

    def world_model():
        index, valid = replay.sample(args.world_model_batch, args.sequence_length)
        columns = [x[index] for x in (replay.actions, replay.rewards, replay.ends)]
        update("world_model", agent.learner.loss(encode(index), *columns, valid)[0])

    def actor_critic():
        index, valid = replay.sample(args.actor_critic_batch, args.burn_in + 1, "last")
        tokens = encode(index)
        policy = agent.actor_critic
        state = policy.initial_state(len(index))
        with torch.no_grad():
            seen = agent.tokenizer.decode(tokens.flatten(0, 1)).unflatten(0, index.shape)
            _, _, state = policy(seen[:, :-1], state, valid[:, :-1])
        real = tokens[:, -1:], tokens[:, :0, 0], seen[:, -1]
        dreamt = naive_dream(agent, *real, state, args.horizon - 1, draw=iris.sample)
        dreamt["state"] = state
        for part in torch.arange(len(index)).split(args.actor_critic_minibatch):
            some = {name: x[part] for name, x in dreamt.items()}
            update("actor_critic", policy.loss(some, args)[0])

    return dict(tokenizer=tokenizer, world_model=world_model, actor_critic=actor_critic)


def benchmark(*flags):
    """--benchmark [iris.py's flags]: each phase of an epoch, ours beside a plain one."""
    args = iris.parse_args([*flags, "--no-perceptual-loss"])
    torch.set_num_threads(THREADS)
    args.tokenizer_updates = args.world_model_updates = args.actor_critic_updates = 1
    replay = iris.Replay(args)  # as large as training's, for the peak of memory
    args.collect_steps = 20
    game = iris.Game(args.env, 0)
    agent = iris.Agent(args, game.num_actions).to(args.device).eval()
    optimizers = iris.make_optimizers(agent, args)
    act = iris.accelerate(agent.act, args)
    dreamer = iris.accelerate(partial(iris.imagine, agent, args.horizon - 1), args)
    collect = partial(iris.collect, agent, act, game, replay, args)
    while replay.size < 1200:
        collect()

    def imagine():
        index, valid = replay.sample(args.actor_critic_batch, args.burn_in + 1, "last")
        last = index[:, -args.context :]
        dreamer(replay.seen(agent.tokenizer, index), valid, replay.tokens[last], replay.actions[last])

    def train(name, *inputs):
        return partial(getattr(iris, f"train_{name}"), agent, optimizers[name], replay, args, *inputs)

    def seconds(work):
        times = []
        for _ in range(4):  # the first warms up: allocators, autotuning, CUDA graphs
            begun = time.perf_counter()
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return np.median(times[1:])

    phases = {  # work, and how many steps, updates, frames or batches it is
        "collect": (collect, 20 + args.burn_in),
        "tokenizer": (train("tokenizer", None), 1),
        "tokens": (partial(iris.tokenize_replay, agent, replay, args), 1280),
        "world_model": (train("world_model"), 1),
        "dream": (imagine, 1),
        "actor_critic": (train("actor_critic", dreamer), 1),
        "evaluation": (partial(iris.play_games, agent, act, args, 1, max_steps=100), 100),
    }
    plain = plain_updates(agent, optimizers, replay, args)
    if args.local_tokens:  # then the line is the revival of codes, once an epoch: plain has none
        del plain["tokenizer"]
    print(f"{args.game}, {args.preset} preset, {args.device}, {torch.get_num_threads()} threads")
    for name, (work, parts) in phases.items():
        ours = seconds(work) / parts
        line = f"  {name:12} {1000 * ours:10.2f} ms"
        if name == "dream":
            line += f", {args.actor_critic_batch * (args.horizon - 1) / ours:.0f} imagined frames a second"
        if name in plain:
            naive = seconds(plain[name])
            line += f", plain {1000 * naive:10.2f} ms, {naive / ours:.2f} x"
        print(line, flush=True)
    if args.device == "cuda":
        print(f"  {torch.cuda.max_memory_allocated() / 1e9:.2f} GB, plain included")


SCRIPTS = {"--benchmark": benchmark, "--baselines": baselines, "--ball": ball, "--kills": kills}
if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        sys.exit("tests: python -m pytest test_iris.py; scripts: python test_iris.py " + " | ".join(SCRIPTS))
    SCRIPTS[sys.argv[1]](*sys.argv[2:])
