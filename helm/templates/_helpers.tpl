{{/* The release's name if it speaks of impala, else <release>-impala. Cut at 40 characters, because a
StatefulSet labels its pods with <fullname>-paramserver-<hash>, and 63 are allowed. */}}
{{- define "impala.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-impala" .Release.Name) (contains "impala" .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Immutable in Deployments and StatefulSets: nothing here may ever change with a version or a value.
Takes a dict with root and component. */}}
{{- define "impala.selectorLabels" -}}
app.kubernetes.io/name: impala
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Of all objects but pods and claims, which a new version of the chart alone must not touch.
Takes the root, or a dict with root, and component or labels of the object's own. */}}
{{- define "impala.labels" -}}
{{- $root := .root | default . -}}
app.kubernetes.io/name: impala
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with merge (deepCopy (.labels | default dict)) $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Takes a dict with root and image: actor or learner. */}}
{{- define "impala.image" -}}
{{- $image := index .root.Values.image .image -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ end -}}
{{- end }}
