"""Values of coalitions of tokens: games, and the engine that evaluates each coalition once."""
