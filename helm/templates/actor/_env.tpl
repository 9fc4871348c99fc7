{{/* Only actors ask the relays. The configuration, which all roles share, names the parameter server. */}}
{{- define "impala.actorEnv" -}}
{{- if .root.Values.paramserver.relays -}}
- name: IMPALA__WIRE__PARAMSERVER_ENDPOINT
  value: tcp://{{ include "impala.fullname" .root }}-relay:5556
{{ end -}}
{{- include "impala.env" . -}}
{{- end }}
