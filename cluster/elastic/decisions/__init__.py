"""The coordinator's judgement as one pure function: `decide.decide(known, observation, now)` returns commands.

Nothing here does input or output, reads a clock, or knows Ray, asyncio or torch.
"""
