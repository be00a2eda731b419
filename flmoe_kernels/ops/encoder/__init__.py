"""Row-wise and dense operators of the fusion encoder, used by interaction_moe."""
