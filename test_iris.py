# SPDX-License-Identifier: MIT
"""Tests of iris.py, each against something that iris.py did not compute: numbers from the authors' code, a naive loop,
a brute force, the emulator itself, a killed process.

    python -m pytest test_iris.py          some minutes on two cores; needs neither a GPU nor a network
"""
import csv
import itertools
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import ale_py
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ale_py import roms

import iris

# Networks that compute in a millisecond. worst-pixel: no test may depend on half a gigabyte of downloaded weights.
TINY = """--preset small --device cpu --no-mixed-precision --perceptual-loss worst-pixel --layers 1 --width 32 --heads 2
    --dropout 0.1 --tokenizer-channels 32 --tokenizer-blocks 1 --stem-stride 4 --embed-dim 16 --vocab-size 32
    --lstm-size 16 --sequence-length 6 --horizon 5 --burn-in 4""".split()
# Four epochs of real Pong: the world model joins in the second, the policy in the third.
SCHEDULE = TINY + """--env Pong --epochs 4 --collect-epochs 3 --collect-steps 30 --tokenizer-start 1 --tokenizer-updates 4
    --tokenizer-batch 4 --revive-codes 3 --world-model-start 2 --world-model-updates 3 --world-model-batch 3
    --actor-critic-start 3 --actor-critic-updates 3 --actor-critic-batch 3 --eval-every 4 --eval-games 1 --final-games 1
    """.split()


def close(actual, expected, rtol=1e-3, atol=2e-6):
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol)


def bold_agent(*flags, actions=6):
    """A tiny agent in eval mode whose outputs depend strongly on all its inputs (fresh networks hardly do)."""
    torch.manual_seed(0)
    args = iris.parse_args([*TINY, *flags])
    agent = iris.Agent(args, actions).eval()
    with torch.no_grad():
        for p in itertools.chain(agent.world_model.parameters(), agent.actor_critic.parameters()):
            p.add_(0.2 * torch.randn_like(p))
        agent.tokenizer.codebook.weight.normal_()
    return agent, args


# ======================================================================================================================
# Parity with the authors' implementation
# ======================================================================================================================
# Their networks were filled by a rule instead of trained, and their outputs written down: whoever fills the same way and
# gets the same numbers computes the same functions.
def official_shapes():
    """Every learnable tensor of an authors' checkpoint (6 actions): name -> shape."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name):
        for i in "12":
            layer(f"{name}.norm{i}", 64)
            layer(f"{name}.conv{i}", 64, 64, 3, 3)

    def attention(name):
        layer(f"{name}.norm", 64)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", 64, 64, 1, 1)

    for coder, way, blocks, sampler in (("encoder", "down", 2, "downsample"), ("decoder", "up", 3, "upsample")):
        name = f"tokenizer.{coder}"
        layer(f"{name}.conv_in", 64, *((3, 3, 3) if way == "down" else (512, 3, 3)))
        for level in range(5):
            for i in range(blocks):
                block(f"{name}.{way}.{level}.block.{i}")
                if level in (2, 3):
                    attention(f"{name}.{way}.{level}.attn.{i}")
            if level != (4 if way == "down" else 0):
                layer(f"{name}.{way}.{level}.{sampler}.conv", 64, 64, 3, 3)
        block(f"{name}.mid.block_1")
        attention(f"{name}.mid.attn_1")
        block(f"{name}.mid.block_2")
        layer(f"{name}.norm_out", 64)
        layer(f"{name}.conv_out", 512 if way == "down" else 3, 64, 3, 3)
    layer("tokenizer.pre_quant_conv", 512, 512, 1, 1)
    layer("tokenizer.post_quant_conv", 512, 512, 1, 1)
    shapes["tokenizer.embedding.weight"] = (512, 512)
    channels = 3
    for part, width, places in ((1, 64, (0, 2)), (2, 128, (5, 7)), (3, 256, (10, 12, 14)), (4, 512, (17, 19, 21)),
                                (5, 512, (24, 26, 28))):
        for place in places:
            layer(f"tokenizer.lpips.net.slice{part}.{place}", width, channels, 3, 3)
            channels = width
        shapes[f"tokenizer.lpips.lin{part - 1}.model.1.weight"] = (1, width, 1, 1)
    for i in range(10):
        name = f"world_model.transformer.blocks.{i}"
        layer(f"{name}.ln1", 256)
        layer(f"{name}.ln2", 256)
        for part in ("key", "query", "value", "proj"):
            layer(f"{name}.attn.{part}", 256, 256)
        layer(f"{name}.mlp.0", 1024, 256)
        layer(f"{name}.mlp.2", 256, 1024)
    layer("world_model.transformer.ln_f", 256)
    shapes.update({"world_model.pos_emb.weight": (340, 256), "world_model.embedder.embedding_tables.0.weight": (6, 256),
                   "world_model.embedder.embedding_tables.1.weight": (512, 256)})
    for head, outputs in (("observations", 512), ("rewards", 3), ("ends", 2)):
        layer(f"world_model.head_{head}.head_module.0", 256, 256)
        layer(f"world_model.head_{head}.head_module.2", outputs, 256)
    for i, (width, channels) in enumerate(((32, 3), (32, 32), (64, 32), (64, 64))):
        layer(f"actor_critic.conv{i + 1}", width, channels, 3, 3)
    shapes.update({"actor_critic.lstm.weight_ih": (2048, 1024), "actor_critic.lstm.weight_hh": (2048, 512),
                   "actor_critic.lstm.bias_ih": (2048,), "actor_critic.lstm.bias_hh": (2048,)})
    layer("actor_critic.critic_linear", 1, 512)
    layer("actor_critic.actor_linear", 6, 512)
    return shapes


def fill(name, shape):
    """The rule that filled the authors' networks."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(math.prod(shape)).reshape(shape)
    if len(shape) == 1:
        x = 1 + 0.1 * x if name.endswith(".weight") else 0.1 * x
    else:
        x = np.abs(x) if "lpips.lin" in name else x
        if not (name.endswith(("embedding.weight", "pos_emb.weight")) or "embedding_tables" in name):
            x = x / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


# Two images of 8 x 8 colour blocks, (2, 3, 8, 8), a byte each.
BLOCKS = bytes.fromhex(
    "7bb9790c09705363da508e52b2da8d00f9171ddd399051461e04280f83ccfe861eb1d503c309ab086d5479b1fb76d300c4c8f5f2b937cfa9"
    "b198ac0157ce65eda9cd22bd87a2124f1d891156db8cb7494ca3eeb8983d29da29fbcc004c00636cd5aab1d496d9652f98a2902fcf5bab51"
    "98c9223a7febc2b556310fa0a587adf9207da9b5c93bb36b263a9abb68082abfbf0f1e1683ea0cd1d9940a43be96bef22ce7db8be892b81f"
    "70c62d23540c66d37c3689e8d9a124986ad6c1f5d0c31a115b1852da1d6972d64b038efbcf7fc5e9ab1242acd26d2f26e3b8946880d6ad56"
    "5fc09c1e394f02304b311d4c61d12fe4435dcd41d60193973bd6a1101e023c6f0c1b247a61120e6bcb5c698b4941ebdede6512e3857bc54f"
    "9bfab2b66ad4ac4175319b191cb1a5e67edd4d7954c8588f71cce128a14e562df147376ebc2c9a738d449029a9c9f7f45a2076d6f70c5af8"
    "50abfd3fc890a7f84c39d319af29f368169d587181472f8c1a65fbb7f7b7463788051c2ac1a38db1d14ba4a5dd3465cd")
# Two texts of 20 steps, (2, 20, 17): 16 frame tokens and an action, three hexadecimal digits each.
TEXTS = (
    "0830b314f1980591080b11ba1ab1a31911a906f0351a00510050a81100f31b71b81d902403615c11016d1030ce10d07802d0000f11040df1"
    "711721640551711571121fe11519a1cb1581630010421a808316d04a0811010b81831060071a81f00ba1cf17a00107008f0db0ac1de0af14"
    "40f20330a21790be1170e607b19800206c16e11304c02405d12e14c0d302a1ec01405c0a31ab1ad0000620d414a0150fd0e405717c1f8184"
    "1990660a31641a016c00514d0ee0671a517a15b1971000a802905b18d1f316206b18c00219604e05e0b008515f1591d903b1fb0861d61e30"
    "121ff0260030060851d10da0e105901109e0e40bf0e91b80ae0f00a80650051d21d51000c603019307915c06f0591f719417e11b1a914500"
    "114f0631611d50b813000e1f11dc0a408e0250030a114619c00506402a0901a91961e60f71c51f918a1521ea01c1e61d614d00005f02a1b7"
    "0530041b51681491f30a30be1b911f08d0901c80040720800150db05714705018c12416a0f919f1c61f614c1ea0041310b701a08e1e600f0"
    "a80150f51cb06218c0ec0ff1f50e700513316c1ae06d0d70f814901501d1980eb1fa0d40b819d0780050391de0d618214d1b40860f50d70f"
    "61670621451101181d50050591e603107307a0180d70af06011e14f0af0a417a0d217f0040c71a201d1c61f40441030e616304816a0ea110"
    "1cb1bb0430031df1791dd04519319d0c110f01e15e0871561a51ce1730680020051960d21350930ab1ed0d21e212a1bf1791321760ca1ee0"
    "0305b06117a05f0bc19306b1cc0d013a1ce13b0700891f70b90000540f308203611a0a301d1ed1371341420f009b06c0ed1080051520ad06"
    "d1270c10041580f71ec0161cd11005908511c1320010b10ba1110f01921270930af13808813d06d1491ba10408700005b1a402214a1a60b9"
    "04b0a90f217905d0041fa1611310b10031b91a91ed1481e30530fc17d06704d19101a0101eb1691f900113217a1fc0551151a401d14e02d0"
    "f616501701a18612d1370000510841c40e405e18707d1261960331b81690a80a80ac03a0040e91540801030a10950d90f111514312919917"
    "706301b07900110d0bd1ce1370fb18f0ff14104e04c0790d609b1430530770021410720551cd1fa0791f618313416408e0aa03a04e1a815b"
    "0001f203c04c16e0d71ad1051fb1d919017f0c806b1601ef09900302b0dc1b904507112618e0130c50010420c616602b16e0a60041be0591"
    "9016a14e0c31820d71c411918108402916803515a0050f20090511591270081b80391580e71a10431981a40530420031510db1de08a1601f"
    "e1391230951780b61d60520380731ea00300704213d11f10d0f80a715d09810f1b70251de1b91f706a00009419600805c1f913f1c20f6154"
    "0681870a01cb1b50760f2000")


@pytest.fixture(scope="module")
def official():
    """A filled checkpoint of the authors', with the buffers besides that theirs hold and that carry nothing."""
    shapes = official_shapes()
    assert len(shapes) == 609
    checkpoint = {name: fill(name, shape) for name, shape in shapes.items()}
    checkpoint["world_model.transformer.blocks.0.attn.mask"] = torch.ones(340, 340)
    checkpoint["world_model.head_rewards.indices"] = torch.arange(20)
    checkpoint["tokenizer.lpips.scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    return checkpoint


@pytest.fixture(scope="module")
def paper(official):
    """The paper's agent and LPIPS, loaded from that checkpoint; and the two images as (2, 64, 64, 3) bytes."""
    agent, lpips = iris.Agent(iris.parse_args(["--preset", "paper", "--device", "cpu"]), 6).eval(), iris.LPIPS()
    iris.load_official(agent, official, lpips)
    blocks = torch.tensor(list(BLOCKS), dtype=torch.uint8).view(2, 3, 8, 8)
    return agent, lpips, blocks.repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)


def test_paper_preset():
    """The paper preset has the paper's numbers; small changes them, and a flag on the command line wins over both."""
    args = iris.parse_args(["--preset", "paper", "--device", "cpu", "--env", "Pong"])
    expected = dict(
        env="ALE/Pong-v5", epochs=600, collect_epochs=500, collect_steps=200, epsilon=0.01, temperature=1.0,
        tokenizer_start=6, tokenizer_updates=200, tokenizer_batch=256, tokenizer_lr=1e-4, world_model_start=26,
        world_model_updates=200, world_model_batch=64, world_model_lr=1e-4, weight_decay=0.01, actor_critic_start=51,
        actor_critic_updates=200, actor_critic_batch=64, actor_critic_lr=1e-4, max_grad_norm=10.0, eval_every=5,
        eval_games=16, final_games=100, eval_temperature=0.5, tokens_per_frame=16, vocab_size=512, embed_dim=512,
        sequence_length=20, layers=10, heads=4, width=256, dropout=0.1, lstm_size=512, burn_in=20, horizon=20,
        gamma=0.995, td_lambda=0.95, entropy_coef=0.001, revive_codes=0, reconstruction_loss="l1")
    assert {name: getattr(args, name) for name in expected} == expected
    small = iris.parse_args(["--preset", "small", "--device", "cpu", "--env", "ALE/Freeway-v5", "--layers", "7"])
    assert small.layers == 7 and small.width < 256 and small.epochs < 600
    assert small.temperature == 0.01  # Freeway's own (appendix): its first reward is far away


def test_parity_parameter_counts(paper):
    """As many parameters as the paper's three networks have."""
    counts = [sum(p.numel() for p in module.parameters()) for module in paper[0].children()]
    assert counts == [4_027_523, 8_448_005, 3_218_983]


@torch.no_grad()
def test_parity_tokenizer(paper):
    """Latents, tokens, reconstructions and the losses, LPIPS among them, are the authors'."""
    agent, lpips, frames = paper
    x = iris.to_network(frames)
    z = agent.tokenizer.encode(x)
    close([z.mean(), z.std()], [0.004302, 0.527073])
    tokens = agent.tokenizer.tokenize(frames)
    assert tokens.tolist() == [
        [136, 197, 332, 274, 197, 197, 198, 136, 197, 197, 316, 136, 136, 197, 136, 136],
        [136, 197, 197, 136, 136, 11, 197, 136, 136, 136, 197, 197, 136, 197, 197, 197]]
    drawn = (agent.tokenizer.decode(agent.tokenizer.embed(tokens)) + 1) / 2
    close(drawn[0, 0, 0, :16], [0.448649, 0.559359, 0.493508, 0.536796, 0.549001, 0.470164, 0.58129, 0.539581, 0.444753,
                                0.379062, 0.432973, 0.40739, 0.418055, 0.329287, 0.338585, 0.337722])
    close([drawn.mean(), drawn.std()], [0.435918, 0.358381])
    loss, metrics, _ = agent.tokenizer.loss(x, lpips, "l1")
    close(metrics["codebook"] + metrics["commitment"], 2.057908)
    close([metrics["reconstruction"], metrics["perceptual"], loss], [0.74846, 0.119931, 2.057908 + 0.74846 + 0.119931])


@torch.no_grad()
def test_parity_world_model(paper):
    """Logits for tokens, rewards and ends, and the three losses under padding, are the authors'."""
    world_model = paper[0].world_model
    text = torch.tensor([int(TEXTS[i:i + 3], 16) for i in range(0, len(TEXTS), 3)]).view(2, 20, 17)
    tokens, actions = text[..., :16], text[..., 16]
    token_logits, reward_logits, end_logits = world_model.predict(tokens, actions)
    assert token_logits.shape == (2, 320, 512)
    close(token_logits[:, -1, :8],
          [[-0.791665, 0.007172, 0.396459, 0.483569, 0.255415, -1.185049, -0.560504, 0.09225],
           [-0.441104, -0.145007, -0.357066, 0.449706, -0.34306, -0.633793, -0.036275, 0.70283]])
    close([token_logits.mean(), token_logits.std()], [0.013447, 0.7346])
    close(reward_logits[0, [0, 9, 19]], [[-0.371959, 0.45127, -0.22122], [-0.597207, 0.749426, -1.03149],
                                         [-0.621544, 1.792211, -0.85611]])
    close(end_logits[1, [0, 9, 19]], [[0.074451, -0.253749], [0.090679, -0.221607], [0.69562, -0.494648]])
    rewards = torch.tensor([[5, 5, 0, -2, 5, 0, 5, -2, 5, -2, 1, -2, -2, 5, 5, -2, 0, 1, 0, 5],
                            [-2, -2, -2, 0, 1, 0, 1, 5, 5, 5, 5, 1, -2, 1, 1, 1, 1, 0, 1, 1]]).float()
    ends, valid = torch.zeros(2, 20, dtype=torch.long), torch.ones(2, 20, dtype=torch.bool)
    ends[1, 11], valid[1, 12:] = 1, False
    loss, metrics = world_model.loss(tokens, actions, rewards, ends, valid)
    close([metrics["token_loss"], metrics["reward_loss"], metrics["end_loss"]], [6.507681, 1.656906, 0.484068])
    close(loss, 6.507681 + 1.656906 + 0.484068)


@torch.no_grad()
def test_parity_actor_critic(paper):
    """Five steps from an empty memory, the images moving by 8 pixels a step: logits and values are the authors'."""
    agent, _, frames = paper
    state = agent.actor_critic.initial_state(2)
    for t, (expected_logits, expected_values) in enumerate((
            ([[-0.158743, 0.041964, -0.120678, 0.201389, 0.089643, 0.067635],
              [-0.178238, 0.009353, -0.103398, 0.230919, 0.084708, 0.113543]], [-0.154965, -0.139999]),
            ([[-0.156531, 0.09235, -0.03043, 0.240176, 0.148975, 0.187253],
              [-0.19868, 0.043498, -0.064526, 0.198426, 0.123039, 0.201854]], [-0.183953, -0.134698]),
            ([[-0.097373, 0.06937, 0.013791, 0.268911, 0.201343, 0.262421],
              [-0.190368, 0.05603, -0.046736, 0.217272, 0.069646, 0.224599]], [-0.189838, -0.091818]),
            ([[-0.07215, 0.086502, 0.003101, 0.297289, 0.218158, 0.325546],
              [-0.180315, 0.084867, -0.072732, 0.235119, 0.089434, 0.29619]], [-0.192771, -0.135242]),
            ([[-0.098016, 0.068875, -0.039255, 0.299391, 0.202879, 0.293898],
              [-0.165146, 0.14937, -0.036728, 0.247195, 0.125723, 0.33033]], [-0.186488, -0.155293]))):
        logits, values, state = agent.actor_critic(iris.to_network(frames).roll(8 * t, dims=-1), state)
        close(logits, expected_logits)
        close(values, expected_values)


def test_parity_lambda_returns():
    """The authors' returns, with an end in the second row."""
    rewards = torch.tensor([[0., 1, -1, 1, 0, 0, 0], [-1, 0, -1, 0, 0, -1, 1]])
    values = torch.tensor([[1.53622, -0.234162, -3.608479, 1.261956, 2.164979, 1.211188, -1.252046, -2.353657],
                           [0.384741, -2.470862, 0.937022, -0.660611, 0.031555, -2.008112, 0.697596, -1.158189]])
    ends = torch.zeros(2, 7)
    ends[1, 4] = 1
    close(iris.lambda_returns(rewards, values, ends, 0.995, 0.95),
          [[-0.807348, -0.841786, -1.758545, -0.868899, -2.091094, -2.27596, -2.341889],
           [-2.000398, -0.928296, -1.031381, 0.00157, 0.0, -1.109349, -0.152398]])


def test_parity_refusals(paper, official):
    """A checkpoint that lacks a tensor, or has one of another shape, is refused in one line that names the problem."""
    agent = paper[0]
    name = "world_model.transformer.blocks.3.attn.key.weight"
    with pytest.raises(iris.InputError, match=name.replace(".", r"\.")) as missing:
        iris.load_official(agent, {key: value for key, value in official.items() if key != name})
    other_game = dict(official, **{"actor_critic.actor_linear.weight": torch.zeros(9, 512)})
    with pytest.raises(iris.InputError, match="9") as misshapen:
        iris.load_official(agent, other_game)
    assert "\n" not in str(missing.value) + str(misshapen.value)


def lpips_cache(folder, official):
    """Writes the two files that LPIPS consists of, with the filled weights, as torch hub's cache would hold them."""
    vgg = {"classifier.0.weight": torch.zeros(2, 2)}  # torchvision's file holds a classifier too; nobody wants it
    vgg.update({f"features.{name.split('.', 4)[4]}": w for name, w in official.items() if ".lpips.net." in name})
    heads = {name.removeprefix("tokenizer.lpips."): w for name, w in official.items() if ".lpips.lin" in name}
    folder.mkdir(parents=True)
    torch.save(vgg, folder / "vgg16-397923af.pth")
    torch.save(heads, folder / "lpips_vgg-a78928a0.pth")


def test_lpips_from_cache(tmp_path, monkeypatch, paper, official):
    """load_lpips takes both files from torch hub's cache, every tensor to its place: the authors' distance comes out."""
    lpips_cache(tmp_path / "hub" / "checkpoints", official)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(iris, "VGG_URL", "file:///nowhere/vgg16-397923af.pth")  # a download would fail
    monkeypatch.setattr(iris, "HEADS_URL", "file:///nowhere/vgg.pth")
    lpips = iris.load_lpips()
    agent, _, frames = paper
    with torch.no_grad():
        close(lpips(iris.to_network(frames), agent.tokenizer.decode(agent.tokenizer.embed(
            agent.tokenizer.tokenize(frames)))).mean(), 0.119931)
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_hash(tmp_path, monkeypatch, official):
    """A download whose contents do not have the published hash is refused, and nothing of it stays in the cache."""
    lpips_cache(tmp_path / "server", official)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(iris, "VGG_URL", (tmp_path / "server" / "vgg16-397923af.pth").as_uri())
    monkeypatch.setattr(iris, "HEADS_URL", (tmp_path / "server" / "lpips_vgg-a78928a0.pth").as_uri())
    with pytest.raises(iris.InputError, match="hash"):
        iris.load_lpips()
    assert not any(path.is_file() for path in (tmp_path / "home").rglob("*"))


# ======================================================================================================================
# Tokenizer
# ======================================================================================================================
def test_tokenizer_64_tokens():
    """K = 64 (appendix E): an 8 x 8 grid, four resolutions, and it comes back as frames of 64 x 64."""
    args = iris.parse_args(["--preset", "paper", "--device", "cpu", "--tokens-per-frame", "64"])
    tokenizer = iris.Tokenizer(args)
    frames = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert tokenizer.encode(iris.to_network(frames)).shape == (2, 512, 8, 8)
        tokens = tokenizer.tokenize(frames)
        assert tokens.shape == (2, 64) and tokenizer.draw(tokens).shape == (2, 3, 64, 64)
    assert sum(isinstance(m, iris.Downsample) for m in tokenizer.modules()) == 3


def test_nearest_code():
    """Tokens are the nearest codes by brute force, row by row, and embed() puts a code back at its place."""
    agent, _ = bold_agent()
    z, codes = torch.randn(3, 16, 4, 4), agent.tokenizer.codebook.weight
    tokens = agent.tokenizer.quantize(z)
    z_q = agent.tokenizer.embed(tokens)
    for n, row, column in itertools.product(range(3), range(4), range(4)):
        nearest = min(range(len(codes)), key=lambda v: float((z[n, :, row, column] - codes[v]).square().sum()))
        assert tokens[n, 4 * row + column] == nearest
        assert torch.equal(z_q[n, :, row, column], codes[nearest])


@pytest.mark.parametrize("loss_name", ["worst-pixel", "l1", "l2"])
def test_tokenizer_loss(loss_name, monkeypatch):
    """The loss against naive loops, and its gradients: the decoder's passes straight through to the encoder, the
    commitment's goes to the encoder only, the codebook's to the codes only."""
    tokenizer = bold_agent()[0].tokenizer
    x, z = torch.rand(3, 3, 64, 64) * 2 - 1, torch.randn(3, 16, 4, 4, requires_grad=True)
    monkeypatch.setattr(tokenizer, "encode", lambda _: z)

    def stand_in(a, b):  # any differentiable distance does for LPIPS
        return ((a - b) ** 4).mean((1, 2, 3))

    loss, metrics, _ = tokenizer.loss(x, None if loss_name == "worst-pixel" else stand_in,
                                      "l1" if loss_name == "worst-pixel" else loss_name)
    loss.backward()
    z_q = tokenizer.embed(tokenizer.quantize(z)).detach().requires_grad_()
    x_hat = tokenizer.decode(z_q)
    terms = []
    for image, drawn in zip(x, x_hat):
        difference = image - drawn
        if loss_name == "worst-pixel":
            d = ((image + 1) / 2 - (drawn + 1) / 2).flatten()  # on images in [0, 1]
            terms.append(0.1 * d.abs().mean() + (d * d).mean() + 0.01 * max(float(v) ** 2 for v in d))
            worst = int(d.abs().argmax())
            terms[-1] = terms[-1] + 0.01 * (d[worst] ** 2 - float(d[worst]) ** 2)  # the same value, with its gradient
        else:
            terms.append((difference.abs() if loss_name == "l1" else difference ** 2).mean() + (difference ** 4).mean())
    outside = sum(terms) / 3
    outside.backward()
    gap = (z - z_q).detach()
    close(loss, float(outside) + 2 * float(gap.square().mean()), rtol=1e-5)
    close(z.grad, z_q.grad + 2 * gap / gap.numel(), rtol=1e-4, atol=1e-7)
    expected = torch.zeros_like(tokenizer.codebook.weight)
    for n, place in itertools.product(range(3), range(16)):
        code = int(tokenizer.quantize(z)[n, place])
        expected[code] -= 2 * gap.flatten(2)[n, :, place] / gap.numel()
    close(tokenizer.codebook.weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_revive_codes():
    """Codes without a use since the last time move onto latents of the batch; used ones, now or before, stay."""
    tokenizer = bold_agent()[0].tokenizer
    run = types.SimpleNamespace(agent=types.SimpleNamespace(tokenizer=tokenizer), code_uses=torch.zeros(32),
                                device=torch.device("cpu"))
    before = tokenizer.codebook.weight.detach().clone()
    early, late = torch.randn(2, 2, 16, 4, 4)
    used = set(tokenizer.quantize(early).flatten().tolist()) | set(tokenizer.quantize(late).flatten().tolist())
    assert used - set(tokenizer.quantize(late).flatten().tolist()) and len(used) < 32  # else this test shows nothing
    iris.Training.revive_codes(run, early, False)
    assert torch.equal(tokenizer.codebook.weight, before)
    iris.Training.revive_codes(run, late, True)
    places = [late[n, :, i, j] for n, i, j in itertools.product(range(2), range(4), range(4))]
    for code, (old, new) in enumerate(zip(before, tokenizer.codebook.weight)):
        assert torch.equal(old, new) if code in used else any(torch.equal(new, place) for place in places)
    assert run.code_uses.sum() == 0


# ======================================================================================================================
# World model
# ======================================================================================================================
def random_text(args, batch=2, steps=None, actions=6):
    steps = steps or args.sequence_length
    return torch.randint(args.vocab_size, (batch, steps, args.tokens_per_frame)), torch.randint(actions, (batch, steps))


@torch.no_grad()
def test_cached_steps_equal_the_full_pass():
    """Uneven chunks through the key-value cache give the hidden states of one pass over the whole text."""
    agent, args = bold_agent("--layers", "3")
    world_model = agent.world_model
    x = world_model.embed(*random_text(args))  # 102 positions: all there are
    full, caches, start = world_model(x), world_model.make_caches(2), 0
    for length in (15, 2, 1, 1, 2, 17, 1, 30, 33):
        chunk = world_model(x[:, start:start + length], caches, start)
        close(chunk, full[:, start:start + length], rtol=1e-4, atol=1e-5)
        start += length
    assert start == x.shape[1] == 102


@torch.no_grad()
def test_causal():
    """A later token or action changes no earlier logit, and does change the next ones."""
    agent, args = bold_agent("--layers", "3")
    tokens, actions = random_text(args)
    before = agent.world_model.predict(tokens, actions)
    for t, k in ((0, 0), (2, 7), (3, 15), (4, 16), (5, 15)):  # k = 16: the action of step t
        changed, acts = tokens.clone(), actions.clone()
        if k < 16:
            changed[:, t, k] = (changed[:, t, k] + 1) % args.vocab_size
        else:
            acts[:, t] = (acts[:, t] + 1) % 6
        after = agent.world_model.predict(changed, acts)
        # Of a step's 17 positions 16 speak: 0 .. 14 and the action's. So position k < 15 speaks as number 16 t + k.
        number = 16 * t + min(k, 15)
        close(after[0][:, :number], before[0][:, :number], atol=1e-6)
        assert (after[0][:, number] - before[0][:, number]).abs().amax() > 1e-3
        for old, new in zip(before[1:], after[1:]):  # rewards and ends are read at the actions
            close(new[:, :t], old[:, :t], atol=1e-6)
            assert (new[:, t] - old[:, t]).abs().amax() > 1e-3


@pytest.mark.parametrize("reward_loss", ["cross-entropy", "mse"])
def test_padding_reaches_no_loss(reward_loss):
    """Whatever stands in padded steps, loss and gradients stay; the unpadded part alone gives the same loss."""
    agent, args = bold_agent("--reward-loss", reward_loss)
    world_model, gradients = agent.world_model, []
    tokens, actions = random_text(args)
    rewards, ends = torch.randn(2, 6), torch.randint(2, (2, 6))
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[:, 4:] = False
    for _ in range(2):
        world_model.zero_grad()
        loss, _ = world_model.loss(tokens, actions, rewards, ends, valid)
        loss.backward()
        gradients.append([p.grad.clone() for p in world_model.parameters()])
        tokens[:, 4:], actions[:, 4:] = (tokens[:, 4:] + 1) % args.vocab_size, (actions[:, 4:] + 1) % 6
        rewards[:, 4:], ends[:, 4:] = 3.0 - rewards[:, 4:], 1 - ends[:, 4:]
    for one, other in zip(*gradients):
        close(one, other, rtol=1e-5, atol=1e-7)
    alone, _ = world_model.loss(tokens[:, :4], actions[:, :4], rewards[:, :4], ends[:, :4], valid[:, :4])
    close(alone, loss.detach(), rtol=1e-5)
    more, _ = world_model.loss(tokens, actions, rewards, ends, torch.ones_like(valid))
    assert (more - loss).abs() > 1e-3  # and unmasked these steps would have counted


def test_sample_inverts_the_cumulative_distribution():
    """Evenly spread numbers hit the classes as often as their probabilities say; impossible classes never."""
    logits, N = torch.tensor([1.0, -math.inf, 0.3, -2.0, 2.0, -math.inf]), 100_000
    u = (torch.arange(N) + 0.5) / N
    for temperature in (1.0, 0.5):
        p = np.exp(logits.double().numpy() / temperature)
        drawn = iris.sample(logits.expand(N, -1), u, temperature).bincount(minlength=6) / N
        close(drawn, p / p.sum(), rtol=0, atol=1e-4)
        assert drawn[1] == drawn[5] == 0
    # The extremes, on distributions whose float32 sums round in every direction.
    torch.manual_seed(0)
    logits = 3 * torch.randn(2000, 50)
    logits[:, :2] = logits[:, -2:] = -math.inf
    for edge in (0.0, 1 - 2 ** -24):
        drawn = iris.sample(logits, torch.full((2000,), edge))
        assert drawn.min() >= 2 and drawn.max() <= 47


# ======================================================================================================================
# Replay
# ======================================================================================================================
LENGTHS = (1, 3, 50, 7, 200)  # of episodes; the last one is still running


@pytest.fixture()
def replay():
    """Step i holds a frame full of i % 256 and the action i % 7."""
    replay = iris.Replay(300, 16, "cpu", torch.float32)
    for length in LENGTHS:
        for t in range(length):
            i = replay.size
            over = length < 200 and t == length - 1
            replay.add(np.full((64, 64, 3), i % 256, np.uint8), i % 7, float(i), over, t == 0)
    return replay


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("align", ["right padding", "left padding"])
@pytest.mark.parametrize("steps", [1, 6, 21])
def test_replay_segments(replay, align, steps):
    """Segments never leave their episode, valid marks exactly what lies inside it, episodes come up equally often
    however long, and every step of an episode is start (right padding) or stop (left padding) equally often."""
    torch.manual_seed(0)
    N, begins = 20_000, np.cumsum((0,) + LENGTHS)
    index, valid = replay.sample(N, steps, align)
    assert index.shape == valid.shape == (N, steps) and valid.dtype == torch.bool
    anchors = index[:, 0 if align == "right padding" else -1].numpy()
    for row, inside, anchor in zip(index.numpy()[:2000], valid.numpy()[:2000], anchors):
        episode = np.searchsorted(begins, anchor, side="right") - 1
        wanted = anchor + np.arange(steps) - (0 if align == "right padding" else steps - 1)
        in_episode = (wanted >= begins[episode]) & (wanted < begins[episode + 1])
        assert (inside == in_episode).all() and (row[inside] == wanted[inside]).all()
        assert (row >= begins[episode]).all() and (row < begins[episode + 1]).all()
    counts = np.histogram(anchors, begins)[0]
    assert chi_square(counts, N / 5) < 25  # 4 degrees of freedom: exceeded once in 20,000 samples
    for begin, length in ((54, 7), (4, 50), (61, 200)):
        inside = np.bincount(anchors, minlength=261)[begin:begin + length]
        assert chi_square(inside, inside.sum() / length) < length + 5 * math.sqrt(2 * length)


def test_replay_keeps_what_it_is_given(replay):
    """Frames, actions, rewards and ends come back as added, also through state_dict."""
    copy = iris.Replay(300, 16, "cpu", torch.float32)
    copy.load_state_dict(replay.state_dict(), replay.frames[:replay.size].numpy())
    for r in (replay, copy):
        assert (r.size, r.episodes) == (261, 5)
        for i in range(261):
            assert (r.frames[i] == i % 256).all() and r.actions[i] == i % 7 and r.rewards[i] == i
        assert r.ends.nonzero().flatten().tolist() == [0, 3, 53, 60]
    torch.manual_seed(0)
    one = replay.sample(100, 6, "left padding")
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one, copy.sample(100, 6, "left padding")))


# ======================================================================================================================
# Environment: real games, against the emulator itself
# ======================================================================================================================
class RawGame:
    """A game on the bare emulator, one raw frame after another."""

    def __init__(self, name, noops):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(name))
        self.ale.reset_game()
        self.actions = self.ale.getMinimalActionSet()
        for _ in range(noops):
            self.ale.act(0)

    def first_frame(self):
        return cv2.resize(self.ale.getScreenRGB(), (64, 64), interpolation=cv2.INTER_AREA)

    def step(self, action):
        """Four raw frames -> the maximum of the last two, resized, and the summed reward."""
        reward, screens = 0, []
        for _ in range(4):
            reward += self.ale.act(self.actions[action])
            screens.append(self.ale.getScreenRGB())
        return cv2.resize(np.maximum(screens[2], screens[3]), (64, 64), interpolation=cv2.INTER_AREA), reward


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("game, name", [("Pong", "pong"), ("MsPacman", "ms_pacman"), ("Breakout", "breakout")])
def test_env_equals_the_emulator(game, name, training):
    """Frames and rewards of make_env are those of a naive loop: frame skip, maximum, resize, minimal actions, raw
    rewards. A single repeated (sticky) action among the 250 random ones would lead elsewhere."""
    env = iris.make_env(f"ALE/{game}-v5", training=training)
    frames, info = env.reset(seed=5)
    assert frames.shape == (1, 1, 64, 64, 3) and frames.dtype == np.uint8
    noops = int(info["episode_frame_number"][0])
    assert (0 < noops <= 30) if training else noops == 0
    raw = RawGame(name, noops)
    assert env.single_action_space.n == len(raw.actions)
    assert (frames[0, 0] == raw.first_frame()).all()
    for t, action in enumerate(np.random.default_rng(3).integers(len(raw.actions), size=250)):
        frames, rewards, *_ = env.step(np.array([action]))
        frame, reward = raw.step(action)
        if raw.ale.game_over():  # the last skip is cut short
            assert t > 50
            break
        assert (frames[0, 0] == frame).all() and rewards[0] == reward
    env.close()


def test_env_starts_vary():
    """In training the seed decides about the number of no-ops, 1 to 30; in evaluation every game starts alike."""
    starts = {}
    for training in (True, False):
        env = iris.make_env("ALE/Pong-v5", training=training)
        starts[training] = [int(env.reset(seed=s)[1]["episode_frame_number"][0]) for s in [*range(40), 0]]
        env.close()
    assert len(set(starts[True])) > 10 and 0 < max(starts[True]) <= 30
    assert starts[True][0] == starts[True][-1] and set(starts[False]) == {0}


def test_env_lost_life():
    """A lost life in Breakout ends the episode in training while the game goes on, and is no end in evaluation."""
    for training in (True, False):
        env = iris.make_env("ALE/Breakout-v5", training=training)
        _, info = env.reset(seed=0)
        rng, lives, losses = np.random.default_rng(0), 5, 0
        while lives > 0:
            clock = info["episode_frame_number"][0]
            _, _, terminated, truncated, info = env.step(rng.integers(4, size=1))
            assert not truncated[0]
            lost, lives = info["lives"][0] < lives, int(info["lives"][0])
            assert bool(terminated[0]) == (lost if training else lives == 0)
            # Four more raw frames and the same game's remaining lives: nothing restarted.
            assert lives == 0 or info["episode_frame_number"][0] == clock + 4
            losses += lost
        assert losses == 5
        env.close()


def test_time_limit():
    """Training cuts a game at 20,000 raw frames: truncated and not terminated, no end in the replay, and a new game
    begins. Evaluation goes on beyond. (Breakout waits for ever for its fire button.)"""
    collector = iris.Collector("ALE/Breakout-v5", 0)
    flags, step = [], collector.env.step

    def recorded_step(action):
        result = step(action)
        flags.append((bool(result[2][0]), bool(result[3][0])))
        return result

    collector.env.step = recorded_step
    replay = iris.Replay(5010, 16, "cpu", torch.float32)
    collector.collect(replay, 5010, lambda frame, first: 0)
    assert [i for i, flag in enumerate(flags) if flag != (False, False)] == [4999] and flags[4999] == (False, True)
    assert replay.ends.sum() == 0 and replay.starts[:replay.episodes].tolist() == [0, 5000]
    assert collector.game == 1 and collector.returns == [0.0]
    env = iris.make_env("ALE/Breakout-v5", training=False)
    env.reset(seed=0)
    for _ in range(5100):
        *_, terminated, truncated, _ = env.step(np.array([0]))
        assert not terminated[0] and not truncated[0]


def test_collector_against_the_emulator():
    """Two games of Breakout: the replay holds what the emulator shows. A lost life ends an episode, one no-op leads to
    the next one's first frame, the next game has its own seed, and a score is the sum over all lives."""
    collector, replay, rng = iris.Collector("ALE/Breakout-v5", 40), iris.Replay(400, 16, "cpu", torch.float32), None
    rng = np.random.default_rng(0)
    firsts, chosen = [], []

    def policy(frame, first):
        firsts.append(first)
        chosen.append(int(rng.integers(4)))
        return chosen[-1]

    collector.collect(replay, 400, policy)
    assert collector.game >= 1

    def new_game(number):
        env = iris.make_env("ALE/Breakout-v5")
        noops = env.reset(seed=40 + number)[1]["episode_frame_number"][0]
        env.close()
        raw = RawGame("breakout", noops)
        return raw, raw.first_frame(), 0

    (raw, frame, score), first, number, scores = new_game(0), True, 0, []
    for i, action in enumerate(chosen):
        lives = raw.ale.lives()
        following, reward = raw.step(action)
        lost = raw.ale.lives() < lives
        assert (replay.frames[i].numpy() == frame).all() and replay.actions[i] == action and firsts[i] == first
        assert replay.rewards[i] == reward and replay.ends[i] == lost
        assert (i in replay.starts[:replay.episodes]) == first
        frame, first, score = following, lost, score + reward
        if raw.ale.game_over():
            scores.append(score)
            number += 1
            raw, frame, score = new_game(number)
        elif lost:
            frame, reward = raw.step(0)
            score += reward
    assert collector.returns == scores and number == collector.game and replay.rewards.sum() > 0


def test_collector_restores_the_emulator():
    """state_dict and load_state_dict in the middle of a game, some lives down: the next 150 frames are the same."""
    def go_on(collector, seed, steps):
        replay, rng = iris.Replay(steps, 16, "cpu", torch.float32), np.random.default_rng(seed)
        collector.collect(replay, steps, lambda frame, first: int(rng.integers(4)))
        return replay, collector.returns

    original = iris.Collector("ALE/Breakout-v5", 7)
    before, _ = go_on(original, 0, 70)
    assert before.ends.sum() > 0
    copy = iris.Collector("ALE/Breakout-v5", 7)
    copy.load_state_dict(json.loads(json.dumps(original.state_dict(), default=int)))
    (one, returns), (other, other_returns) = go_on(original, 1, 150), go_on(copy, 1, 150)
    assert returns == other_returns and len(returns) > 0  # across the game's end, so the score came along
    for name in ("frames", "rewards", "ends", "starts", "actions"):
        assert torch.equal(getattr(one, name), getattr(other, name))


# ======================================================================================================================
# Actor-critic and dreams
# ======================================================================================================================
def test_lambda_returns():
    """By hand; and as the weighted mean of all n-step returns, which is how the lambda-return is defined."""
    by_hand = iris.lambda_returns(torch.tensor([[1.0, 2.0]]), torch.tensor([[9.0, 2.0, 4.0]]), torch.zeros(1, 2), 0.5, 0.25)
    # G_1 = 2 + 0.5 * 4 = 4;  G_0 = 1 + 0.5 (0.75 * 2 + 0.25 * 4) = 2.25;  V_0 = 9 has no part in it
    assert by_hand.tolist() == [[2.25, 4.0]]
    cut = iris.lambda_returns(torch.tensor([[1.0, 2.0]]), torch.tensor([[9.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0]]), 0.5, 0.25)
    assert cut.tolist() == [[1.0, 4.0]]

    torch.manual_seed(0)
    B, H, gamma, lambda_ = 6, 12, 0.9, 0.8
    rewards, values = torch.randn(B, H - 1), torch.randn(B, H)
    ends = (torch.rand(B, H - 1) < 0.15).float()
    returns = iris.lambda_returns(rewards, values, ends, gamma, lambda_)

    def n_step(b, t, n):
        total = 0.0
        for k in range(n):
            total += gamma ** k * float(rewards[b, t + k])
            if ends[b, t + k]:
                return total
        return total + gamma ** n * float(values[b, t + n])

    for b, t in itertools.product(range(B), range(H - 1)):
        longest = H - 1 - t
        expected = sum((1 - lambda_) * lambda_ ** (n - 1) * n_step(b, t, n) for n in range(1, longest))
        expected += lambda_ ** (longest - 1) * n_step(b, t, longest)
        assert abs(float(returns[b, t]) - expected) < 1e-4


@torch.no_grad()
def naive_dream(agent, tokens, past_actions, frame, state, u, actions=None):
    """A dream by the book: for every single token the world model reads the whole text so far."""
    world_model, text = agent.world_model, []

    def hidden():
        return world_model(torch.stack(text, dim=1))[:, -1]

    def draw(logits, numbers):
        p = torch.softmax(logits.double(), -1).numpy()
        return torch.tensor([int(np.searchsorted(np.cumsum(row), x, side="right")) for row, x in zip(p, numbers.numpy())])

    for t in range(tokens.shape[1]):
        text += [world_model.token_embedding(token) for token in tokens[:, t].T]
        text += [world_model.action_embedding(past_actions[:, t])] if t < past_actions.shape[1] else []
    dreamt = dict(frames=[frame], tokens=[tokens[:, -1]], actions=[], rewards=[], ends=[])
    for t in range(u.shape[1]):
        logits, _, state = agent.actor_critic(frame, state)
        action = draw(logits, u[:, t, 0]) if actions is None else actions[:, t]
        text.append(world_model.action_embedding(action))
        dreamt["actions"].append(action)
        reward = world_model.head_reward(hidden())
        dreamt["rewards"].append(draw(reward, u[:, t, 1]) - 1.0 if reward.shape[-1] == 3 else reward[:, 0])
        dreamt["ends"].append(draw(world_model.head_end(hidden()), u[:, t, 2]).float())
        drawn = []
        for k in range(tokens.shape[2]):
            drawn.append(draw(world_model.head_token(hidden()), u[:, t, 3 + k]))
            text.append(world_model.token_embedding(drawn[-1]))
        dreamt["tokens"].append(torch.stack(drawn, dim=1))
        frame = agent.tokenizer.decode(agent.tokenizer.embed(dreamt["tokens"][-1])).clamp(-1, 1)
        dreamt["frames"].append(frame)
    return {name: torch.stack(steps, dim=1) for name, steps in dreamt.items()}, state


def dream_inputs(agent, args, context=1, horizon=None, batch=3):
    torch.manual_seed(1)
    tokens, actions = random_text(args, batch, context)
    state = tuple(torch.randn(2, batch, args.lstm_size))
    u = torch.rand(batch, (horizon or args.horizon) - 1, args.tokens_per_frame + 3)
    return tokens, actions[:, :-1], agent.tokenizer.draw(tokens[:, -1]).detach(), state, u


@pytest.mark.parametrize("context, given, flags", [
    (1, False, ["--horizon", "6", "--layers", "2"]), (3, False, ["--horizon", "4"]),  # both fill the memory exactly
    (2, True, []), (1, False, ["--reward-loss", "mse", "--tokens-per-frame", "64", "--horizon", "3"])])
def test_dream_equals_step_by_step(context, given, flags):
    """With the same random numbers, dream() and the dream by the book agree: every action, reward, end and token, the
    frames and the policy's memory. Given actions are obeyed."""
    agent, args = bold_agent(*flags)
    inputs = dream_inputs(agent, args, context)
    steps = inputs[-1].shape[1]
    actions = torch.randint(6, (3, steps)) if given else None
    fast = iris.dream(agent, *inputs, actions=actions)
    slow, state = naive_dream(agent, *inputs, actions=actions)
    for name in ("tokens", "actions", "ends"):
        assert torch.equal(fast[name].long(), slow[name].long()), name
    for name in ("rewards", "frames"):
        close(fast[name], slow[name], rtol=1e-4, atol=1e-4)
    for one, other in zip(fast["state"], state):
        close(one, other, rtol=1e-4, atol=1e-4)
    assert fast["frames"].shape == (3, steps + 1, 3, 64, 64)
    assert not given or torch.equal(fast["actions"], actions)
    assert len(slow["tokens"].unique()) > 10 and len(slow["actions"].unique()) > 2  # not the same thing all the time


def test_unroll_and_burn_in():
    """unroll() gives what single calls give; burn_in() what the valid frames alone give, whatever the padding shows."""
    policy_net = bold_agent()[0].actor_critic
    frames, valid = torch.rand(4, 6, 3, 64, 64) * 2 - 1, torch.arange(6) >= torch.tensor([0, 2, 5, 6])[:, None]
    start = tuple(torch.randn(2, 4, 16))
    logits, values = policy_net.unroll(frames, start)
    state = start
    for t in range(6):
        one_logits, one_values, state = policy_net(frames[:, t], state)
        close(logits[:, t], one_logits, rtol=1e-4, atol=1e-5)
        close(values[:, t], one_values, rtol=1e-4, atol=1e-5)
    burnt = policy_net.burn_in(frames, valid)
    for b in range(4):
        state = policy_net.initial_state(1)
        for t in range(6):
            if valid[b, t]:
                _, _, state = policy_net(frames[b:b + 1, t], state)
        for one, other in zip(burnt, state):
            close(one[b], other[0].detach(), rtol=1e-4, atol=1e-5)
    assert not burnt[0].requires_grad and burnt[0][3].abs().sum() == 0  # nothing valid: an empty memory


def test_actor_critic_loss():
    """REINFORCE, value and entropy terms against a loop over dreams and steps. Steps after an end count for nothing.
    The gradient reaches every weight of the actor-critic and nothing else."""
    agent, args = bold_agent()
    inputs = dream_inputs(agent, args, batch=4)
    imagined = iris.dream(agent, *inputs)
    imagined["ends"] = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).float()
    imagined["rewards"] = torch.randn(4, 4)
    loss, metrics = agent.actor_critic.loss(imagined, inputs[3], args)
    loss.backward()
    for name, p in agent.named_parameters():
        moved = p.grad is not None and bool(p.grad.abs().sum() > 0)
        assert moved == name.startswith("actor_critic."), name

    with torch.no_grad():
        logits, values = agent.actor_critic.unroll(imagined["frames"], inputs[3])
    returns = iris.lambda_returns(imagined["rewards"], values, imagined["ends"], args.gamma, args.td_lambda)
    policy, value, entropy, steps = 0.0, 0.0, 0.0, 0
    for b in range(4):
        for t in range(4):
            p = np.exp(logits[b, t].double().numpy())
            p /= p.sum()
            gain = float(returns[b, t] - values[b, t])
            policy -= math.log(p[imagined["actions"][b, t]]) * gain
            value += gain ** 2
            entropy -= (p * np.log(p)).sum()
            steps += 1
            if imagined["ends"][b, t]:
                break
    assert steps == 4 + 2 + 1 + 4
    close([metrics["policy_loss"], metrics["value_loss"], metrics["entropy"]],
          [policy / steps, value / steps, entropy / steps], rtol=1e-4)
    close(loss.detach(), (policy + value - args.entropy_coef * entropy) / steps, rtol=1e-4)

    gradients = [p.grad.clone() for p in agent.actor_critic.parameters()]
    agent.zero_grad()
    imagined["rewards"][1, 2:], imagined["rewards"][2, 1:] = 100.0, -100.0
    imagined["actions"][2, 1:] = (imagined["actions"][2, 1:] + 1) % 6
    imagined["frames"][2, 2:] = torch.randn(3, 3, 64, 64)
    agent.actor_critic.loss(imagined, inputs[3], args)[0].backward()
    for before, p in zip(gradients, agent.actor_critic.parameters()):
        close(p.grad, before, rtol=1e-3, atol=1e-5)


# ======================================================================================================================
# Evaluation
# ======================================================================================================================
def test_evaluate_counts_every_game():
    """Four games of Ms. Pac-Man, one after another or three side by side: the same returns, and those of a loop that
    plays a game at a time on the bare emulator, with a fresh memory and random numbers of its own."""
    agent, args = bold_agent("--env", "MsPacman", actions=9)
    with torch.no_grad():
        agent.actor_critic.actor.weight.mul_(5)  # a policy with an opinion: a forgotten reset would show in the returns
    returns = {}
    for parallel in (1, 3):
        args.parallel_games = parallel
        returns[parallel], recording = iris.evaluate(agent, args, 4, record=50)
        assert recording["frames"].shape == (50, 64, 64, 3) and len(recording["actions"]) == 50
    expected, seed = [], args.seed * 100_000 + 50_000
    for game in range(4):
        raw, luck = RawGame("ms_pacman", 0), np.random.default_rng([seed, game])
        frame, state, score = raw.first_frame(), agent.actor_critic.initial_state(1), 0
        while not raw.ale.game_over():
            u = torch.tensor([luck.random()], dtype=torch.float32)
            action, state = agent.act(torch.from_numpy(frame)[None], state, u, args.eval_temperature)
            frame, reward = raw.step(int(action))
            score += reward
        expected.append(score)
    assert len(set(expected)) > 1
    assert returns[1].tolist() == returns[3].tolist() == expected


@torch.no_grad()
def test_held_out_metrics():
    """Cross-entropy and accuracy of the forecasts, and of copying the frame before, against a loop over tokens."""
    agent, args = bold_agent()
    torch.manual_seed(2)
    frames = torch.randint(256, (13, 64, 64, 3), dtype=torch.uint8)
    frames[1::3] = frames[0::3][:4]  # every third frame repeats the one before, so copying is right at times
    actions = torch.randint(6, (13,))
    metrics = iris.held_out_metrics(agent, dict(frames=frames, actions=actions), args)
    tokens, bits, right, copied, n = agent.tokenizer.tokenize(frames), 0.0, 0, 0, 0
    for begin in (0, 6):  # whole segments of the sequence length; the 13th frame is left over
        logits = agent.world_model.predict(tokens[None, begin:begin + 6], actions[None, begin:begin + 6])[0][0]
        for t, k in itertools.product(range(1, 6), range(16)):
            p = logits[16 * t + k - 1].double().softmax(-1)
            target = int(tokens[begin + t, k])
            bits, right, n = bits - math.log(p[target]), right + (int(p.argmax()) == target), n + 1
            copied += target == int(tokens[begin + t - 1, k])
    c = copied / n
    close([metrics["token_cross_entropy"], metrics["token_accuracy"], metrics["copy_accuracy"]], [bits / n, right / n, c])
    close(metrics["copy_cross_entropy"], -c * math.log(c) - (1 - c) * math.log((1 - c) / 31))
    close(metrics["uniform_cross_entropy"], math.log(32))
    real = frames[:12].movedim(-1, 1).float() / 255
    drawn = (agent.tokenizer.draw(tokens[:12]) + 1) / 2
    close(metrics["heldout_l1"], (real - drawn).abs().mean())
    close(metrics["heldout_psnr"], 10 * math.log10(1 / float((real - drawn).square().mean())))


# ======================================================================================================================
# The command line, on real Pong
# ======================================================================================================================
def command(*flags):
    return [sys.executable, str(Path(iris.__file__)), *map(str, flags)]


def only_folder(path):
    (folder,) = Path(path).iterdir()
    return folder


def start_and_stop(run_dir, after_epoch, how, delay):
    """Starts a training, waits until an epoch is done and a little longer, and ends the process by a signal."""
    with subprocess.Popen(command(*SCHEDULE, "--run-dir", run_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while True:
                assert process.poll() is None, process.communicate()
                rows = [path.read_text().splitlines() for path in Path(run_dir).glob("*/metrics.csv")]
                if rows and rows[0][-1].startswith(f"{after_epoch},"):
                    break
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(how)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    return only_folder(run_dir), process.returncode, errors


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder and the output of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = subprocess.run(command(*SCHEDULE, "--run-dir", run_dir), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return only_folder(run_dir), done


@pytest.fixture(scope="session")
def killed_run(tmp_path_factory):
    """The folder of a run that was killed in the middle of its third epoch, or fourth."""
    folder, code, _ = start_and_stop(tmp_path_factory.mktemp("killed"), 2, signal.SIGKILL, random.uniform(0, 0.3))
    assert code == -signal.SIGKILL and not (folder / "eval.json").exists()
    return folder


def read_rows(folder):
    """metrics.csv without what a clock or the machine's memory says."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(("seconds", "memory"))} for row in csv.DictReader(file)]


def assert_same(one, other, path="checkpoint"):
    """Equal to the last bit, all the way down."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            if not str(key).startswith(("seconds", "memory")):
                assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{path}.{i}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, path


def assert_same_run(folder, other):
    assert read_rows(folder) == read_rows(other)
    checkpoints = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (folder, other)]
    for checkpoint in checkpoints:
        del checkpoint["args"]  # the folders differ, and test_refusals sees to the rest
    assert_same(*checkpoints)
    assert (folder / "frames.bin").read_bytes() == (other / "frames.bin").read_bytes()
    assert json.loads((folder / "eval.json").read_text()) == json.loads((other / "eval.json").read_text())


def test_whole_training(whole_run):
    """A run collects, trains all three networks, evaluates, and leaves behind what a run consists of."""
    folder, done = whole_run
    assert done.stderr == "" and done.stdout.count("\n") >= 6 and "Traceback" not in done.stdout
    config = json.loads((folder / "config.json").read_text())
    assert (config["env"], config["layers"], config["perceptual_loss"]) == ("ALE/Pong-v5", 1, "worst-pixel")
    rows = read_rows(folder)
    assert [row["real_steps"] for row in rows] == ["30", "60", "90", "90"]
    for name, first in (("tokenizer_loss", 1), ("world_model_loss", 2), ("actor_critic_loss", 3), ("eval_return", 4)):
        assert [row[name] != "" for row in rows] == [epoch >= first for epoch in (1, 2, 3, 4)], name
    torch.manual_seed(config["seed"])
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    fresh = iris.Agent(iris.parse_args([*SCHEDULE, "--run-dir", "x"]), 6).state_dict()
    assert state["agent"].keys() == fresh.keys()
    for part in ("tokenizer", "world_model", "actor_critic"):
        assert any(not torch.equal(state["agent"][name], fresh[name]) for name in fresh if name.startswith(part))
    replayed = np.fromfile(folder / "frames.bin", np.uint8).reshape(90, 64, 64, 3)
    assert len(np.unique(replayed[-1].reshape(-1, 3), axis=0)) > 3  # Pong: field, two paddles, score
    result = json.loads((folder / "eval.json").read_text())
    assert len(result["returns"]) == 1 and -21 <= result["eval_return"] == result["returns"][0] <= 21
    pictures = {path.stem: cv2.imread(str(path)) for path in folder.glob("media/*004/*.png")}
    assert {"reconstructions", "dream"} <= pictures.keys()
    for picture in pictures.values():
        assert min(picture.shape[:2]) > 100 and picture.std() > 5


def test_killed_and_resumed(whole_run, killed_run, tmp_path):
    """kill -9 in the middle of an epoch loses this epoch only: resumed, the run ends as the undisturbed one did, to the
    last bit of its weights, optimisers, replay and metrics."""
    folder = shutil.copytree(killed_run, tmp_path / "run")
    assert 2 <= len(read_rows(folder)) < 4
    done = subprocess.run(command("--resume", folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, whole_run[0])


def test_stopped_and_resumed(whole_run, tmp_path):
    """SIGTERM (or Ctrl-C) in the first trained epochs: one line that tells how to go on, code 130; and going on works."""
    folder, code, errors = start_and_stop(tmp_path, 1, signal.SIGTERM, 0.05)
    assert code == 130 and errors.count("\n") == 1 and f"--resume {folder}" in errors
    done = subprocess.run(command("--resume", folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, whole_run[0])


def test_final_evaluation_again(whole_run, tmp_path):
    """A run killed during its final evaluation repeats it, with the same result: nothing random is left in the
    networks, dropout least of all."""
    folder = shutil.copytree(whole_run[0], tmp_path / "run")
    (folder / "eval.json").unlink()
    assert iris.main(["--resume", str(folder)]) == 0
    assert_same_run(folder, whole_run[0])


@pytest.mark.parametrize("limit", ["frames", "checkpoint"])
def test_full_disk(killed_run, tmp_path, limit):
    """No room for the replay's frames, or for the checkpoint: one line, code 2, the last checkpoint is untouched."""
    folder = shutil.copytree(killed_run, tmp_path / "run")
    checkpoint, metrics = (folder / "checkpoint.pt").read_bytes(), (folder / "metrics.csv").read_bytes()
    frames = torch.load(folder / "checkpoint.pt", weights_only=True)["replay"]["size"] * 64 * 64 * 3
    assert frames * 2 < len(checkpoint)
    room = frames if limit == "frames" else len(checkpoint) // 2

    def limit_file_size():  # Python ignores SIGXFSZ, so a write beyond fails as one to a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done = subprocess.run(command("--resume", folder), capture_output=True, text=True, preexec_fn=limit_file_size)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint and (folder / "metrics.csv").read_bytes() == metrics
    assert (folder / "frames.bin").stat().st_size >= frames


def test_loss_that_is_not_finite(tmp_path, capfd):
    """A learning rate beyond reason: the run stops with code 1 and one line, and the last good checkpoint stays."""
    flags = [*SCHEDULE, "--run-dir", tmp_path, "--tokenizer-start", "2", "--tokenizer-lr", "1e30"]
    assert iris.main([str(flag) for flag in flags]) == 1
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and "not finite" in errors
    state = torch.load(only_folder(tmp_path) / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1 and all(bool(value.isfinite().all()) for value in state["agent"].values())


def refuse(capfd, flags, *saying):
    """Runs a command line that cannot work: code 2 and one line on stderr, which says `saying`."""
    capfd.readouterr()
    try:
        code = iris.main([str(flag) for flag in flags])
    except SystemExit as stop:  # argparse's way
        code = stop.code
    errors = capfd.readouterr().err
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("iris.py: "), errors
    for part in saying:
        assert str(part).lower() in errors.lower(), errors


ABSENT = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both


@pytest.mark.parametrize("flags, saying", [
    (["--env", "Brekout"], ["Brekout", "Breakout"]),
    (["--collect-steps", "-5"], ["--collect-steps", "-5"]),
    (["--epochs", "many"], ["--epochs", "many"]),
    (["--gamma", "nan"], ["--gamma", "nan"]),
    (["--device", ABSENT], ["--device", ABSENT]),
    (["--horizon", "7"], ["--horizon", "--sequence-length"]),
    (["--width", "33"], ["--width", "--heads"]),
    (["--tokenizer-channels", "40"], ["--tokenizer-channels", "32"]),
    (["--collect-epochs", "5"], ["--collect-epochs", "--epochs"]),
    (["--no-such-flag"], ["--no-such-flag"]),
])
def test_flags_refused(flags, saying, tmp_path, capfd):
    """Flags that cannot work are refused with their name, before anything is written."""
    refuse(capfd, [*SCHEDULE, "--run-dir", tmp_path / "runs", *flags], *saying)
    assert not (tmp_path / "runs").exists()


def test_refused_from_a_shell(tmp_path):
    """The same as a process of its own: one line on stderr from interpreter, libraries and all, and code 2."""
    done = subprocess.run(command(*SCHEDULE, "--env", "Pon", "--run-dir", tmp_path), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Pong" in done.stderr and done.stdout == ""


def test_unwritable_run_dir(tmp_path, capfd):
    """A run folder that cannot be made: here even for root, below a regular file."""
    (tmp_path / "file").write_text("")
    refuse(capfd, [*SCHEDULE, "--run-dir", tmp_path / "file" / "runs"], tmp_path / "file")


def no_lpips(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(iris, "VGG_URL", "http://127.0.0.1:9/vgg16-397923af.pth")  # nobody listens there
    monkeypatch.setattr(iris, "HEADS_URL", "http://127.0.0.1:9/vgg.pth")


def test_no_lpips(monkeypatch, tmp_path, capfd):
    """Without weights and network --perceptual-loss lpips is refused; auto goes on without it, says so in a line, and
    the run's config records it."""
    no_lpips(monkeypatch, tmp_path)
    refuse(capfd, [*SCHEDULE, "--perceptual-loss", "lpips", "--run-dir", tmp_path / "runs"], "lpips", "worst-pixel")
    assert not (tmp_path / "runs").exists()
    args = iris.parse_args([*SCHEDULE, "--perceptual-loss", "auto", "--run-dir", str(tmp_path / "runs")])
    folder = iris.new_run(args)
    assert capfd.readouterr().out.count("\n") == 1
    assert json.loads((folder / "config.json").read_text())["perceptual_loss"] == "worst-pixel"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def flip_bytes(path):
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, len(data) // 2 + 8):
        data[i] ^= 0xFF
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("damage, flags, saying", [
    (lambda run: shutil.rmtree(run), [], ["config.json"]),
    (lambda run: (run / "config.json").unlink(), [], ["config.json"]),
    (lambda run: truncate(run / "config.json"), [], ["config.json", "damaged"]),
    (lambda run: edit_config(run, gamma=0.5), [], ["checkpoint.pt", "other flags"]),
    (lambda run: edit_config(run, layers=2), [], ["checkpoint.pt", "other flags"]),
    (lambda run: None, ["--layers", "3"], ["--layers", "1"]),
    (lambda run: flip_bytes(run / "checkpoint.pt"), [], ["checkpoint.pt"]),
    (lambda run: truncate(run / "checkpoint.pt"), [], ["checkpoint.pt"]),
    (lambda run: (run / "checkpoint.pt").write_text("not a checkpoint"), [], ["checkpoint.pt"]),
    (lambda run: (run / "frames.bin").unlink(), [], ["frames.bin"]),
    (lambda run: truncate(run / "frames.bin"), [], ["frames.bin"]),
    (lambda run: torch.save({"epoch": 1}, run / "checkpoint.pt"), [], ["checkpoint.pt"]),
    (lambda run: edit_config(run, no_such_flag=1), [], ["config.json"]),
], ids=["no folder", "no config", "half a config", "other gamma", "other size", "contradicting flag", "flipped bytes",
        "half a checkpoint", "text", "no frames", "half the frames", "foreign checkpoint", "foreign config"])
def test_resume_refused(whole_run, tmp_path, capfd, damage, flags, saying):
    """A run folder that is damaged or contradicted is refused, and nothing in it is changed."""
    folder = shutil.copytree(whole_run[0], tmp_path / "run")
    damage(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refuse(capfd, ["--resume", folder, *flags], *saying)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
