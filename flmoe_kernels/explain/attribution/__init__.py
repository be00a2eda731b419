"""How much each token says to a logit: rollouts and integrated gradients."""
