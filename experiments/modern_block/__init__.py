"""What each choice buys between GPT-2's block and the modern one, alone and together: README.md."""
