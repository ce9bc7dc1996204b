"""The paper's study again, on models at hand and by prediction."""
