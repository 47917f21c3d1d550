"""What the share of books in the data does to the scores on code and on books, and what repeating a small text costs: README.md."""
