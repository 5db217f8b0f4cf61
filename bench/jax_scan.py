"""JAX, with the whole epoch compiled as one lax.scan."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.common import Config, Contender, load, run


def logits(params: Any, x: jax.Array) -> jax.Array:
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    return x @ weight + bias


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(logits(params, x))
    return -jnp.take_along_axis(log_probabilities, y[:, None], axis=1).mean()


def initial_params(sizes: list[int], rng: np.random.Generator) -> Any:
    """Return a pair of weight and bias per layer."""
    params = []
    for inputs, outputs in pairwise(sizes):
        bound = inputs**-0.5
        weight = jnp.array(rng.uniform(-bound, bound, (inputs, outputs)), jnp.float32)
        params.append((weight, jnp.array(rng.uniform(-bound, bound, outputs), jnp.float32)))
    return params


def make_contender(config: Config) -> Contender:
    train_images, train_labels = map(jnp.array, load("train", np.int32))
    test_images, test_labels = map(jnp.array, load("test", np.int32))
    rng = np.random.default_rng(0)
    params = initial_params([784, config.hidden_dim, config.hidden_dim, 10], rng)
    state = params, jax.tree.map(jnp.zeros_like, params)

    def step(state: Any, indices: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        params, velocity = state
        loss, grads = jax.value_and_grad(loss_fn)(params, images[indices], labels[indices])
        if config.momentum:
            velocity = jax.tree.map(lambda v, g: config.momentum * v + g, velocity, grads)
            grads = velocity
        params = jax.tree.map(lambda p, g: p - config.learning_rate * g, params, grads)
        return (params, velocity), loss

    @partial(jax.jit, donate_argnums=0)
    def scan_epoch(state: Any, permutation: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        whole = len(permutation) // config.batch_size * config.batch_size
        batches = permutation[:whole].reshape(-1, config.batch_size)
        state, losses = jax.lax.scan(
            lambda state, indices: step(state, indices, images, labels), state, batches
        )
        if whole < len(permutation):
            state, _ = step(state, permutation[whole:], images, labels)
        return state, losses

    def train_epoch(_: int) -> float:
        nonlocal state
        permutation = jnp.array(rng.permutation(len(train_labels)))
        state, losses = scan_epoch(state, permutation, train_images, train_labels)
        losses.block_until_ready()
        return 1.0

    def accuracy() -> float:
        return float((logits(state[0], test_images).argmax(1) == test_labels).mean())

    return train_epoch, accuracy


if __name__ == "__main__":
    run(make_contender)
