{{/* Pods of `helm test` stay until the next test, so that their logs can be read. Nobody scrapes them, and no
Service leads to them. */}}
{{- define "impala.testMetadata" -}}
labels:
  {{- include "impala.labels" . | nindent 2 }}
annotations:
  helm.sh/hook: test
  helm.sh/hook-delete-policy: before-hook-creation
{{- end }}
