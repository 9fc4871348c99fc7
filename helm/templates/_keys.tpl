{{/* The name of the Secret with the keys. */}}
{{- define "impala.keysName" -}}
{{- with .Values.security -}}
{{- if and .existingSecret .perRole.existingSecret -}}
{{- fail (printf "security.existingSecret = %q, security.perRole.existingSecret = %q: allowed is one of them" .existingSecret .perRole.existingSecret) -}}
{{- end -}}
{{- .perRole.existingSecret | default .existingSecret | default (printf "%s-keys" (include "impala.fullname" $)) -}}
{{- end -}}
{{- end }}

{{/* The data of the chart's own Secret, as JSON. The seed is drawn once, at the first install, and found by
`lookup` ever after. It is put where every template of this rendering finds it again: drawn twice, the
pods' checksum would be that of another seed, and the first upgrade would restart everybody. */}}
{{- define "impala.keysData" -}}
{{- if not (hasKey .Values.security "data") -}}
  {{- $data := (lookup "v1" "Secret" .Release.Namespace (include "impala.keysName" .)).data | default dict -}}
  {{- $_ := set .Values.security "data" ($data | default (dict "seed" (randAlphaNum 64 | b64enc))) -}}
{{- end -}}
{{- .Values.security.data | toJson -}}
{{- end }}

{{/* Whether the chart makes the Secret itself. */}}
{{- define "impala.ownsKeys" -}}
{{- with .Values.security -}}
{{- if and .enabled (not .existingSecret) (not .perRole.existingSecret) }}true{{ end -}}
{{- end -}}
{{- end }}

{{/* What a role mounts of the Secret: the seed, or its own secret and the public keys of the others it meets.
Takes a dict with root and keys: the role. */}}
{{- define "impala.keysItems" -}}
{{- if .root.Values.security.perRole.existingSecret -}}
{{- $peers := dict
  "actor" (list "learner" "paramserver")
  "learner" (list "actor" "paramserver")
  "paramserver" (list "actor" "learner" "evaluator")
  "evaluator" (list "paramserver") -}}
- {key: {{ .keys }}.secret, path: {{ .keys }}.secret}
{{- range index $peers .keys }}
- {key: {{ . }}.public, path: {{ . }}.public}
{{- end }}
{{- else -}}
- {key: seed, path: seed}
{{- end }}
{{- end }}
