"""Attribution of a logit to single tokens: attention rollouts and integrated gradients."""
