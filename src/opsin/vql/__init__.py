"""Visual query localization in five stages (REN-VQL, arXiv 2505.18153, after RELOCATE, 2412.01826)."""
