{{/* The RunConfig of all pods: `config`, and what only the chart knows. Nothing here depends on `actors` or
`learners`, so that scaling restarts nobody: the parameter server tells who is there. */}}
{{- define "impala.config" -}}
{{- $full := include "impala.fullname" . -}}
{{- $runId := .Values.runId | default .Release.Name -}}
{{- $wire := dict
  "learner_bind" "tcp://*:5555"
  "paramserver_endpoint" (printf "tcp://%s-paramserver:5556" $full)
  "paramserver_bind" "tcp://*:5556" -}}
{{- if .Values.security.enabled -}}
{{- $_ := set $wire "keys" "/etc/impala-keys" -}}
{{- end -}}
{{- $computed := dict
  "run_id" $runId
  "run_dir" (printf "/data/%s" $runId)
  "wire" $wire
  "paramserver" (dict "remembers" .Values.paramserver.persistence.enabled)
  "ops" (dict "host" "0.0.0.0" "port" 9400) -}}
{{- mergeOverwrite (deepCopy .Values.config) $computed | toJson -}}
{{- end }}
