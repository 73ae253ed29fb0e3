"""What a run says of itself: report.html, pictures, the model card, energy."""
