"""Samplers side by side on problems whose best value is known: one file, one command.

    python -m studies.comparison studies/sampler_comparison.yaml

- ``protocol``: what the file may say;
- ``problems``: all of them; ``problem``: one; ``measured``, ``synthetic``, ``functions``,
  ``networks``: their families;
- ``importing``: samplers and problems of your own;
- ``peers``, ``openings``, ``outside``: the samplers;
- ``running``: studies in parallel processes, recorded as they end;
- ``summary``, ``figures``: what is made of the records, by ``optuna_lora_rl.learning.statistics``.

Regret is 0 at the best known configuration and 1 at the median one; it is that of the best
configuration tried so far, without its noise. Differences are paired over problems and seeds, and
their intervals are 95% bootstrap intervals over both, so an interval that holds 0 is a tie.
"""
