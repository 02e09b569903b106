"""Run models with OpenVINO GenAI."""
