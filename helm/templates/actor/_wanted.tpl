{{/* How many actors are wanted: those that are seated now, more by the share of time in which the learners
starve (at most twice as many at a time), fewer by the share of time in which actors are blocked and by the
share of rollouts that are too old to train on. None once training is complete. Actors are producers: an
actor's own load says nothing about how many there should be. */}}
{{- define "impala.actorsWanted" -}}
{{- $release := printf "namespace=%q, release=%q" .Release.Namespace .Release.Name -}}
max(impala_paramserver_seats{ {{- $release }}, role="paramserver"})
/ clamp_min(1 - avg(rate(impala_learner_stage_seconds_sum{ {{- $release }}, stage="wait"}[2m])), 0.5)
* clamp_min(1 - avg(rate(impala_actor_seconds_total{ {{- $release }}, stage="send_blocked"}[2m])), 0.5)
* (1 - sum(rate(impala_learner_rollouts_total{ {{- $release }}, result="stale"}[2m]))
  / clamp_min(sum(rate(impala_learner_rollouts_total{ {{- $release }}}[2m])), 1e-9))
* (1 - max(impala_training_complete{ {{- $release }}}))
{{- end }}
