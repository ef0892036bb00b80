"""The examples of the documentation run and do what they say."""

from statistics import fmean

from examples.your_own_loop import main


def test_alignment_in_a_loop_of_ones_own_learns_both_losses():
    history = main(num_steps=40)
    denoising, aligned = zip(*history, strict=True)
    assert fmean(denoising[-5:]) < 0.9 * fmean(denoising[:5])
    assert fmean(aligned[-5:]) < fmean(aligned[:5]) - 0.1
    assert all(-1 <= value <= 1 for value in aligned)  # a negative mean cosine
