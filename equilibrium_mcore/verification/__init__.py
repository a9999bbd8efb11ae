"""What a text is worth: answers, numbers, code in a sandbox; rewards from them. No torch.

`Scorer` scores texts by settings. Evaluation and data synthesis use the parts below it: `answers`,
`compare`, `sandbox`.
"""
