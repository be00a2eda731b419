"""Games over tokens: what a model's logit is when only some tokens are present."""
