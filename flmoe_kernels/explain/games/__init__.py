"""Games over tokens: a model's logit when only some tokens are present."""
