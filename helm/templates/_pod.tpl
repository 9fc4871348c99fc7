{{/* What all pods have in common. Each of these takes a dict:
  root       the root
  component  the role, as in labels
  settings   its section of the values
  image      actor or learner
  keys       whose keys it holds: a relay has those of the parameter server */}}

{{- define "impala.podMetadata" -}}
labels:
  {{- include "impala.selectorLabels" . | nindent 2 }}
  {{- with merge (deepCopy (.settings.podLabels | default dict)) .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  checksum/config: {{ include "impala.config" .root | sha256sum }}
  {{- if include "impala.ownsKeys" .root }}
  checksum/keys: {{ include "impala.keysData" .root | sha256sum }}
  {{- else if .root.Values.security.enabled }}
  # Not of its data: a Secret that came after the pods would restart them all at the next upgrade.
  checksum/keys: {{ include "impala.keysName" .root | sha256sum }}
  {{- end }}
  {{- if .root.Values.monitoring.annotations }}
  prometheus.io/scrape: "true"
  prometheus.io/port: "9400"
  prometheus.io/path: /metrics
  {{- end }}
  {{- with .settings.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "impala.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ int .root.Values.terminationGracePeriodSeconds }}
{{- with .root.Values.serviceAccountName }}
serviceAccountName: {{ . | quote }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $field := list "nodeSelector" "affinity" "tolerations" "priorityClassName" "runtimeClassName" }}
{{- with index $.settings $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .settings.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $own := dict "labelSelector" (dict "matchLabels" (include "impala.selectorLabels" $ | fromYaml)) }}
  - {{- toYaml (merge (deepCopy .) $own) | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "impala.container" -}}
image: {{ include "impala.image" . | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
workingDir: /tmp
# The last words of a process that fails are in its log.
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
{{- end }}

{{/* Liveness is the age of the process's own heartbeat, so a pod that waits for a peer is left alone. */}}
{{- define "impala.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 2
  failureThreshold: 150
livenessProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 5
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}

{{- define "impala.env" -}}
- {name: HOME, value: /tmp}
{{- with .settings.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "impala.volumeMounts" -}}
- {name: config, mountPath: /etc/impala, readOnly: true}
{{- if .root.Values.security.enabled }}
- {name: keys, mountPath: /etc/impala-keys, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
{{- with .settings.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "impala.volumes" -}}
- name: config
  configMap: {name: {{ include "impala.fullname" .root }}}
{{- if .root.Values.security.enabled }}
- name: keys
  secret:
    secretName: {{ include "impala.keysName" .root | quote }}
    defaultMode: 0440
    items:
      {{- include "impala.keysItems" . | nindent 6 }}
{{- end }}
- name: tmp
  emptyDir: {}
{{- with .settings.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* /data of a StatefulSet's pods where the chart makes no claim for it. */}}
{{- define "impala.dataVolume" -}}
{{- with .settings.persistence -}}
{{- if and .enabled .existingClaim -}}
- name: data
  persistentVolumeClaim: {claimName: {{ .existingClaim | quote }}}
{{- else if not .enabled -}}
- name: data
  emptyDir: {}
{{- end }}
{{- end }}
{{- end }}

{{/* Claims are immutable, so they carry no labels that could change. */}}
{{- define "impala.dataClaim" -}}
{{- with .settings.persistence -}}
{{- if and .enabled (not .existingClaim) -}}
volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: {{ toJson .accessModes }}
      {{- with .storageClass }}
      storageClassName: {{ . | quote }}
      {{- end }}
      resources: {requests: {storage: {{ .size | quote }}}}
{{- end }}
{{- end }}
{{- end }}
