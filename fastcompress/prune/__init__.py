"Zeros and missing channels: schedules, scores, masks, removal."
