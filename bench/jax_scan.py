"""JAX, the whole epoch compiled as one lax.scan."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.common import Config, load, run


def logits(parameters: Any, x: jax.Array) -> jax.Array:
    for weight, bias in parameters[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = parameters[-1]
    return x @ weight + bias


def loss_fn(parameters: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(logits(parameters, x))
    return -jnp.take_along_axis(log_probabilities, y[:, None], axis=1).mean()


def contender(config: Config) -> tuple[Callable[[int], float], Callable[[], float]]:
    images, test_images = (
        jnp.array(load(name)[0].astype(np.float32) / 255) for name in ("train", "test")
    )
    labels, test_labels = (jnp.array(load(name)[1].astype(np.int32)) for name in ("train", "test"))
    random = np.random.default_rng(0)
    parameters: Any = []
    for inputs, outputs in pairwise([784, config.hidden_dim, config.hidden_dim, 10]):
        bound = inputs**-0.5
        shapes = ((inputs, outputs), (outputs,))
        parameters.append(
            tuple(jnp.array(random.uniform(-bound, bound, shape), jnp.float32) for shape in shapes)
        )
    state = parameters, jax.tree.map(jnp.zeros_like, parameters)

    def step(state: Any, batch: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        parameters, velocity = state
        loss, grads = jax.value_and_grad(loss_fn)(parameters, images[batch], labels[batch])
        if config.momentum:
            velocity = jax.tree.map(lambda v, g: config.momentum * v + g, velocity, grads)
            grads = velocity
        parameters = jax.tree.map(lambda p, g: p - config.learning_rate * g, parameters, grads)
        return (parameters, velocity), loss

    @partial(jax.jit, donate_argnums=0)
    def scan_epoch(state: Any, order: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        whole = len(order) // config.batch_size * config.batch_size
        batches = order[:whole].reshape(-1, config.batch_size)
        state, losses = jax.lax.scan(
            lambda state, batch: step(state, batch, images, labels), state, batches
        )
        if whole < len(order):
            state, _ = step(state, order[whole:], images, labels)
        return state, losses

    def epoch(_: int) -> float:
        nonlocal state
        order = jnp.array(random.permutation(len(labels)))
        state, losses = scan_epoch(state, order, images, labels)
        losses.block_until_ready()
        return 1.0

    def accuracy() -> float:
        return float((logits(state[0], test_images).argmax(1) == test_labels).mean())

    return epoch, accuracy


if __name__ == "__main__":
    run(contender)
