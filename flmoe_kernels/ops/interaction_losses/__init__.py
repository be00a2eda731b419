"""The M + 2 losses of the interaction experts."""

from .api import interaction_losses as interaction_losses
