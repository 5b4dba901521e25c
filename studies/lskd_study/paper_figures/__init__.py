"""The paper's figures, from any teacher or table: each a matplotlib figure and the numbers behind it."""
