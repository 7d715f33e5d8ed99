"""The texts that `lightrm demo` scores: our own prompts, each with a proper answer and three damaged ones."""

from __future__ import annotations

GOOD, LOOP, STOP, OTHER = "is proper", "repeats itself", "breaks off", "is about something else"

EXAMPLES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "How do I keep cut apples from turning brown?",
        (
            (OTHER, "A sonnet has fourteen lines. It is usually written in iambic pentameter and ends in a couplet."),
            (STOP, "Apples turn brown because the cut surface reacts with oxygen. Put the slices in cold water with a"),
            (
                GOOD,
                "Apples turn brown because the cut surface reacts with oxygen. Put the slices in cold water with a "
                "little lemon juice or salt, then keep them in a closed container in the fridge.",
            ),
            (
                LOOP,
                "Apples turn brown because the cut surface reacts with oxygen. Put the slices in cold water, put the "
                "slices in cold water, put the slices in cold water, put the slices in cold water.",
            ),
        ),
    ),
    (
        "怎样才能睡得更好？",
        (
            (LOOP, "想睡得更好，可以每天在固定的时间睡觉，固定的时间睡觉，固定的时间睡觉，固定的时间睡觉。"),
            (GOOD, "想睡得更好，可以每天在固定的时间睡觉和起床，睡前不看手机，少喝咖啡，并让卧室保持安静和黑暗。"),
            (OTHER, "长城是中国古代的军事防御工程，全长超过两万公里，主要修建于秦朝和明朝。"),
            (STOP, "想睡得更好，可以每天在固定的时间睡觉和起床，睡前不看手机，少喝"),
        ),
    ),
)
