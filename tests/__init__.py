"""The tests. `stages` comes first because it sets how MLX is loaded."""

import stages as stages
