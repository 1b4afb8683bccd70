"""``--compare torch``: the same steps in PyTorch, on as many threads, with data in memory.

A plain step is SGD with momentum on a batch of a random permutation. The step of Arbiter is here twice:

* in memory, the method as `aj.arbiter` computes it: features without a gradient, B_s examples drawn
  in memory, one gradient with respect to the agent, the mixture and the response alone;
* as published: loaders on the training and on the validation data, of which that of the agent's inputs
  and that of the meta batch are rebuilt at every step; a network in training mode, whose own
  gradient of the meta-loss is computed and discarded; the mixture copied for each example.

PyTorch is imported when a row is made, and only there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optax

import arbiter_jax as aj
from experiments.benchmark import floor, programs
from experiments.benchmark.networks import SHAPE, Network, Timed
from experiments.benchmark.row import Row

RANGE = (8, 512)  # batch sizes of Arbiter, as by default
PAUSE = (
    0.02  # seconds until the threads of PyTorch sleep: they would slow down what is measured next
)


def load() -> Any:
    """PyTorch with as many threads as JAX has.

    Raises:
      ImportError: If it is missing.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            "--compare torch needs PyTorch, which is not installed: pip install 'arbiter-jax[torch]'."
        ) from None
    torch.set_num_threads(floor.cores())
    return torch


def _mlp(nn: Any) -> tuple[Any, Any]:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU()), nn.Linear(256, 10)


def _lenet(nn: Any) -> tuple[Any, Any]:
    body = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
    )
    return body, nn.Linear(84, 10)


def _wide_resnet(nn: Any) -> tuple[Any, Any]:
    """WRN-16-4."""

    class Block(nn.Module):
        def __init__(self, num_inputs: int, num_outputs: int, stride: int):
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(num_inputs), nn.BatchNorm2d(num_outputs)
            conv = lambda n, width, **options: nn.Conv2d(
                n, num_outputs, width, bias=False, **options
            )
            self.conv1 = conv(num_inputs, 3, stride=stride, padding=1)
            self.conv2 = conv(num_outputs, 3, padding=1)
            same = num_inputs == num_outputs
            self.shortcut = None if same else conv(num_inputs, 1, stride=stride)

        def forward(self, x):
            y = self.norm1(x).relu()
            x = x if self.shortcut is None else self.shortcut(y)
            return x + self.conv2(self.norm2(self.conv1(y)).relu())

    widths, strides = (16, 64, 64, 128, 128, 256, 256), (1, 1, 2, 1, 2, 1)
    blocks = [Block(a, b, s) for a, b, s in zip(widths, widths[1:], strides, strict=False)]
    body = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks),
        *(nn.BatchNorm2d(256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return body, nn.Linear(256, 10)


def _mlp_agent(nn: Any, channels: int) -> Any:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, channels), nn.ReLU(), nn.Linear(channels, 4))


def _conv_agent(nn: Any, channels: int) -> Any:
    """Four convolutions of stride 3, as `aj.conv_agent`: 28 pixels become 10, 4, 2 and 1."""
    layers = []
    for num_inputs, padding in ((1, 1), (channels, 1), (channels, 1), (channels, 1)):
        layers += [nn.Conv2d(num_inputs, channels, 3, stride=3, padding=padding), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


BODIES = {"MLP": _mlp, "LeNet": _lenet, "WRN-16-4": _wide_resnet}
AGENTS = {"MLP": _mlp_agent, "LeNet": _conv_agent}


class Trainer:
    """A network in PyTorch, its data, and the steps that train it."""

    def __init__(self, name: str, data: Any, batch_size: int):
        torch = self.torch = load()
        torch.manual_seed(0)
        self.name, self.batch_size = name, batch_size
        inputs, labels = data
        images = np.asarray(inputs).transpose(0, 3, 1, 2)
        self.inputs = torch.from_numpy(np.array(images, np.float32, order="C"))
        self.labels = torch.from_numpy(np.array(labels, np.int64))
        self.num_validation = len(inputs) // 4
        self.body, self.head = BODIES[name](torch.nn)
        self.parameters = [*self.body.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9)
        self.order = torch.empty(0, dtype=torch.long)

    def take(self) -> tuple[Any, Any]:
        """The next batch of a permutation."""
        if len(self.order) < self.batch_size:
            self.order = self.torch.randperm(len(self.inputs))
        rows, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return self.inputs[rows], self.labels[rows]

    def descend(self, batch: tuple[Any, Any]) -> None:
        """One step of SGD."""
        inputs, labels = batch
        self.optimizer.zero_grad()
        self._loss(self.head(self.body(inputs)), labels).backward()
        self.optimizer.step()

    def plain(self) -> Callable[[], None]:
        """A plain step with data in memory."""
        return lambda: self.descend(self.take())

    def arbiter(self, channels: int, num_agent_inputs: int) -> Callable[[], None]:
        """A step of Arbiter with data in memory."""
        torch, hyper = self.torch, Hyper(self, channels)

        def draw(size: int) -> tuple[Any, Any]:
            rows = torch.randint(self.num_validation, (size,))
            return self.inputs[rows], self.labels[rows]

        def step() -> None:
            self.descend(self.take())
            mixture = hyper.mixture(draw(num_agent_inputs)[0])
            inputs, labels = draw(hyper.batch_size(mixture))
            with torch.no_grad():
                features = self.body(inputs)
            response = features * (1 + hyper.response * mixture)
            head = self.head
            logits = torch.nn.functional.linear(response, head.weight.detach(), head.bias.detach())
            hyper.learn(self._loss(logits, labels))

        return step

    def as_published(self, channels: int) -> Callable[[], None]:
        """A step of Arbiter that reads all data from loaders, and differentiates the whole network."""
        torch, hyper = self.torch, Hyper(self, channels)
        held = slice(0, self.num_validation)
        training = torch.utils.data.TensorDataset(self.inputs, self.labels)
        validation = torch.utils.data.TensorDataset(self.inputs[held], self.labels[held])

        def loader(dataset: Any, size: int) -> Any:
            return torch.utils.data.DataLoader(dataset, batch_size=size, shuffle=True)

        def epochs() -> Iterator[Any]:
            while True:
                yield from loader(training, self.batch_size)

        batches = epochs()

        def step() -> None:
            self.descend(next(batches))
            mixture = hyper.mixture(next(iter(loader(validation, self.batch_size)))[0])
            size = hyper.batch_size(mixture)
            inputs, labels = next(iter(loader(validation, size)))
            response = hyper.response * mixture.expand(size, 1)
            logits = self.head(self.body(inputs) * (1 + response))
            hyper.learn(self._loss(logits, labels))

        return step

    def _loss(self, logits: Any, labels: Any) -> Any:
        return self.torch.nn.functional.cross_entropy(logits, labels)


class Hyper:
    """The agent, the mixture and the response, and what trains them."""

    def __init__(self, trainer: Trainer, channels: int):
        torch = self.torch = trainer.torch
        self.agent = AGENTS[trainer.name](torch.nn, channels)
        self.alpha = torch.nn.Parameter(1e-6 * torch.randn(4))
        self.response = torch.nn.Parameter(2 * torch.rand(trainer.head.in_features) - 1)
        groups = [
            {"params": [*self.agent.parameters(), self.response]},
            {"params": [self.alpha], "lr": 1e-4},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=1e-5, weight_decay=5e-4)
        # The mixture is at the logit of the batch size: anchored, as by default in `aj.arbiter`.
        low, high = RANGE
        share = (trainer.batch_size + 0.5 - low) / (high - low)
        self.target, self.offset = float(np.log(share / (1 - share))), None

    def mixture(self, inputs: Any) -> Any:
        """The mixture of the proposals for a batch of inputs."""
        proposals = self.torch.sort(self.agent(inputs).mean(0))[0]
        if self.offset is None:
            unanchored = self.torch.softmax(self.alpha, 0) @ proposals
            self.offset = self.target - float(unanchored.detach())
        return self.torch.softmax(self.alpha, 0) @ (proposals + self.offset)

    def batch_size(self, mixture: Any) -> int:
        """The meta batch size of a mixture."""
        low, high = RANGE
        return int((high - low) * self.torch.sigmoid(mixture.detach()) + low)

    def learn(self, loss: Any) -> None:
        """One step on the meta-loss."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def timed(step: Callable[[], None], window: int) -> Timed:
    """Milliseconds of a step in PyTorch."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(window):
            step()
        milliseconds = 1e3 * (time.perf_counter() - start) / window
        time.sleep(PAUSE)
        return milliseconds

    return run


def rows(lenet: Network, mlp: Network, config: Any) -> list[Row]:
    """The same steps in PyTorch."""
    size, window, found = config.batch_size, config.window, []

    def against_torch(network: Network, tx: Any, make: Callable, **options: Any):
        def pair() -> tuple[Timed, Timed]:
            trainer = Trainer(network.name, network.data.train, size)
            other = timed(make(trainer), window)
            return network.timed(tx, size, window, **options), other

        return pair

    published = {"LeNet": (aj.conv_agent(SHAPE, channels=64), 64, 16), "MLP": (mlp.agent, 32, 32)}
    for network in (lenet, mlp):
        plain = optax.chain(network.optimizer, aj.schedulers.constant(size))
        agent, wide, narrow = published[network.name]
        arbiter, large = network.arbiter(size), network.arbiter(size, agent)
        name, work = f"{network.name},", lambda network=network: floor.network_work(network, size)
        in_memory = lambda t, narrow=narrow: t.arbiter(narrow, 32)
        from_loaders = lambda t, wide=wide: t.as_published(wide)
        found += [
            Row(
                f"{name} plain step / torch",
                1.00,
                against_torch(network, plain, lambda t: t.plain()),
                work,
            ),
            Row(
                f"{name} Arbiter / torch, data in memory",
                0.67,
                against_torch(network, arbiter, in_memory),
                work,
            ),
            Row(
                f"{name} Arbiter with the published agent on B inputs / torch, as published",
                0.33,
                against_torch(network, large, from_loaders, num_agent_inputs=size),
                work,
            ),
        ]

    def wide_resnets() -> tuple[Timed, Timed]:
        task = programs.wide_resnet_task()
        trainer = Trainer("WRN-16-4", task.data.train, 32)
        other = timed(trainer.plain(), task.window)
        return task.timed(task.plain, 32), other

    work = lambda: floor.task_work(programs.wide_resnet_task(), 32)
    return [*found, Row("WRN-16-4, plain step / torch, B = 32", 1.10, wide_resnets, work)]
