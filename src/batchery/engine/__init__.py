"""What makes batches run: lifecycle, planner, scheduler, dispatcher, retry, recorder, finaliser, reaper, worker."""
