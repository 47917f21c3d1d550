"""Speed beside torch and transformers on this machine's CPU: python -m tools.bench"""
