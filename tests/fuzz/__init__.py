"""What comes from outside, damaged at random: each input ends in a result or in one line."""
